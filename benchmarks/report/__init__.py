"""From the files of runs to the tables of the documents: ``python -m benchmarks.report``."""
