"""One command for a GPU machine: facts, tests, sanitizers, benchmarks. ``python3 -m benchmarks.gpu``."""
