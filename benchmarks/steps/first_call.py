"""What the first call costs: the compilation of the kernels that the trainer needs, and what a process does besides.

``make first-call`` prints it and writes ``benchmarks/results/first_call.json``. The kernels are those that a training
run launches on the emulator, with each engine; a new process compiles them for sm_90 by NVRTC, one after the other.
With them in CuPy's disk cache a new process imports this package and reads their texts: what is timed as "warm". Not in
it: importing NumPy and CuPy, and CuPy's own look into its cache and loading of a module, which need a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness.timing import RESULTS, facts, write_json
from bnkernels.train.config import TrainingConfig
from tools.compile import nvrtc

ARCHITECTURE = 90
COLD, WARM = 1.0, 0.05  # seconds: targets
ENGINES = ("layers", "fused")
RUNS = 5
CHILD = """
import json, sys, time
import numpy
before = time.perf_counter()
import bnkernels
from bnkernels.runtime import source
kernels = json.loads(sys.argv[1])
imported = time.perf_counter()
texts = [source.read(*kernel) for kernel in kernels]
read = time.perf_counter()
compiled = []
if sys.argv[2] == "compile":
    from tools.compile import nvrtc
    nvrtc.architectures()  # loads it
    for text in texts:
        started = time.perf_counter()
        nvrtc.resources(text, int(sys.argv[3]))
        compiled.append(time.perf_counter() - started)
print(json.dumps([imported - before, read - imported, compiled]))
"""


def launched(engine: str) -> list[tuple[str, str, tuple]]:
    """Return source, name and constants of every kernel of the default training run with an engine, on the emulator."""
    from bnkernels.train.learner import Learner
    from tools import backends

    runtime = backends.emulated_runtime()
    runtime.reset()
    backend, config = backends.make("emulator"), TrainingConfig(engine=engine, steps=2)
    rng = np.random.default_rng(0)
    rows = config.batch_size * 2
    x = backend.asarray(rng.standard_normal((rows, 64)).astype(config.dtype))
    y = backend.asarray(rng.integers(0, 10, rows).astype(np.int32))
    for norm in config.norms:
        learner = Learner(norm, config, (64, *config.hidden, 10), backend.xp)
        learner.train(x, y, 0, 2, lambda: False)
        learner.evaluate(x, y)
    return list(
        dict.fromkeys((record.source, record.entry_point, record.launch.constants) for record in runtime.launches)
    )


def child(kernels: Sequence[tuple[str, str, tuple]], what: str) -> tuple[float, float, list[float]]:
    """Return from a new process the seconds to import the package, to read the texts, and to compile each of them."""
    command = [sys.executable, "-c", CHILD, json.dumps(list(kernels)), what, str(ARCHITECTURE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return tuple(json.loads(done.stdout))


def measure() -> dict[str, Any]:
    """Return the document: for each engine kernels with their seconds, and the totals."""
    engines = {}
    for engine in ENGINES:
        kernels = launched(engine)
        _, _, cold = child(kernels, "compile")
        warm = [child(kernels, "read") for _ in range(RUNS)]
        imported, read = (sorted(run[i] for run in warm)[RUNS // 2] for i in range(2))
        engines[engine] = {
            "kernels": [
                {"kernel": name, "compile_s": round(seconds, 3)}
                for (_, name, _), seconds in zip(kernels, cold, strict=True)
            ],
            "cold_s": round(sum(cold), 3),
            "import_s": round(imported, 4),
            "read_s": round(read, 4),
        }
    return {**facts(), "nvrtc": nvrtc.NEWEST, "architecture": ARCHITECTURE, "engines": engines}


def text(document: dict[str, Any]) -> str:
    """Return the document as lines for a terminal."""
    lines = []
    for engine, found in document["engines"].items():
        lines.append(f"engine {engine}")
        lines += [f"  {row['kernel']:44}{row['compile_s']:8.2f} s" for row in found["kernels"]]
        imported, read = 1e3 * found["import_s"], 1e3 * found["read_s"]
        cold, warm = found["cold_s"], imported + read
        lines.append(f"  cold, all of them: {cold:.2f} s; at most {COLD:g}, {'met' if cold <= COLD else 'not met'}")
        lines.append(
            f"  warm: {warm:.0f} ms ({imported:.0f} to import, {read:.0f} to read); at most {1e3 * WARM:g}, "
            f"{'met' if warm <= 1e3 * WARM else 'not met'}; CuPy's own part: not measured"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.steps.first_call", description=__doc__.splitlines()[0]
    ).parse_args(arguments)
    document = measure()
    print(text(document))
    write_json(RESULTS / "first_call.json", document)


if __name__ == "__main__":
    main()
