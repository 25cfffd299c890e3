"""``python -m tests.emulator``: sanitized runs, coverage of the kernels, mutants."""

from __future__ import annotations

import argparse
import sys

from .build import BUILDS
from .sanitizers import run


def main() -> int:
    """Run one of the emulator's commands and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run pytest on a build of the emulator; fail on any report")
    running.add_argument("build", choices=BUILDS)
    running.add_argument("--module", default="pytest", help="another module to run")
    running.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="of pytest")
    options = parser.parse_args()
    return run(options.build, options.module, options.arguments)


if __name__ == "__main__":
    sys.exit(main())
