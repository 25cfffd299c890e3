"""``python -m tools.emulator``: sanitized runs, coverage of the kernels, mutants, training."""

from __future__ import annotations

import argparse
import sys

from .build import BUILDS, EmulatorError, compiler
from .coverage import coverage
from .mutant_list import MUTANTS
from .mutants import check
from .sanitizers import run
from .train import train


def main() -> int:
    """Run one of the emulator's commands and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.emulator",
        description=__doc__,
        epilog="What follows -- are arguments of pytest, or of train.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run pytest on a build of the emulator; fail on any report")
    running.add_argument("build", choices=BUILDS)
    running.add_argument("--module", default="pytest", help="another module to run")
    commands.add_parser("train", help="run bnkernels train on the emulator, with its arguments behind --")
    commands.add_parser("coverage", help="list the lines of cuda/ that no emulated test executes")
    planting = commands.add_parser(
        "mutants", help="plant bugs in the kernels; fail unless the tests notice all of them"
    )
    planting.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth of them, for a quick look")
    planting.add_argument("--name", default="", metavar="TEXT", help="only those whose name begins with it")
    separator = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    arguments = sys.argv[separator + 1 :]
    options = parser.parse_args(sys.argv[1:separator])
    try:
        compiler()
        if options.command == "train":
            return train(arguments)
        if options.command == "coverage":
            return coverage(arguments)
        if options.command == "mutants":
            chosen = [mutant for mutant in MUTANTS if mutant.name.startswith(options.name)]
            if not chosen:
                raise EmulatorError(f"--name must begin the name of a mutant, and none begins with {options.name!r}")
            return check(chosen[:: max(1, options.every)])
        return run(options.build, options.module, arguments)
    except EmulatorError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
