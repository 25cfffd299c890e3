"""The batch-norm paper's experiment in full, into ``results/ioffe2015``: `bnkernels reproduce`, and the commit."""

from __future__ import annotations

import sys

from benchmarks.harness.timing import RESULTS, facts
from bnkernels.train.reproduce import STEPS, Experiment, run, write


def main() -> int:
    """Run all steps of the paper and write document and pictures."""
    document = run(Experiment(steps=STEPS))
    place = "cuda" if document["environment"]["device"] == "cuda" else "cpu"
    document["environment"] |= {name: fact for name, fact in facts(place=place).items() if name != "threads"}
    write(document, RESULTS / "ioffe2015")
    return 0


if __name__ == "__main__":
    sys.exit(main())
