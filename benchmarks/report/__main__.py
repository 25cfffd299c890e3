"""``python -m benchmarks.report``."""

from benchmarks.report.documents import main

if __name__ == "__main__":
    main()
