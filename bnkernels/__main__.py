"""``python -m bnkernels`` is the command ``bnkernels``."""

from bnkernels.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
