"""The batch-norm paper's experiment in full, into ``results/ioffe2015``: `bnkernels reproduce`, and the commit.

Once with binary images, as in the paper, and once with grey ones, into a folder of its own within.
"""

from __future__ import annotations

import sys

from benchmarks.harness.timing import RESULTS, facts
from bnkernels.train.reproduce import STEPS, Experiment, run, write

FOLDERS = {"binary": RESULTS / "ioffe2015", "grey": RESULTS / "ioffe2015" / "grey"}


def main() -> int:
    """Run all steps of the paper and write documents and pictures."""
    for pixels, folder in FOLDERS.items():
        document = run(Experiment(pixels=pixels, steps=STEPS))
        place = "cuda" if document["environment"]["device"] == "cuda" else "cpu"
        document["environment"] |= {name: fact for name, fact in facts(place=place).items() if name != "threads"}
        write(document, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
