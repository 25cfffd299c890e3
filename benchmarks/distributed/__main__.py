"""Measure ranks on this machine: ``python -m benchmarks.distributed``, into the results of the device.

It starts 1, 2, 3 and 4 ranks under mpiexec, one thread each, and writes ``distributed.json``; and ``distributed.svg``,
what the model that is fitted to them predicts for many.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.distributed import model
from benchmarks.harness.case import cores
from benchmarks.harness.timing import ROOT, facts, results_folder, write_json
from benchmarks.peers.torch_gloo import free_port
from bnkernels.train.checkpoint import write_atomically

RANKS = (1, 2, 3, 4)
ONE_THREAD = {
    "BNKERNELS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


def mpiexec() -> str | None:
    """Return the command that starts ranks, of this environment or the system; None where there is none."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("mpiexec", path=path)


def measured(size: int, *options: str) -> dict[str, Any]:
    """Return what some ranks measure."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rank.json")
        command = [mpiexec(), "--allow-run-as-root", "--oversubscribe", "-n", str(size), sys.executable]
        command += ["-m", "benchmarks.distributed.rank", "--json", str(file), "--port", str(free_port()), *options]
        subprocess.run(command, cwd=ROOT, env=os.environ | ONE_THREAD, check=True)
        return json.loads(file.read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the file goes; default the device's results")
    parser.add_argument("--quick", action="store_true", help="few ranks, shapes and rounds: to see that it works")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="only draw the picture of the JSON in this folder")
    options = parser.parse_args(arguments)
    if options.plot:
        document = json.loads((options.plot / "distributed.json").read_text(encoding="utf-8"))
        write_atomically(options.plot / "distributed.svg", model.draw(document))
        return
    if mpiexec() is None:
        sys.exit("error: needs mpiexec: pip install 'bnkernels[mpi]'")
    about = facts("mpi4py", "torch") | {"cores": cores(), "load": round(os.getloadavg()[0], 1)}
    found: dict[str, list[Any]] = {}
    for size in RANKS[:2] if options.quick else RANKS:
        print(f"{size} ranks", flush=True)
        few = ("--rounds", "3", "--shapes", "1") if options.quick else ()
        for kind, rows in measured(size, *few).items():
            found.setdefault(kind, []).extend(rows)
    folder = options.out or results_folder(about)
    write_json(folder / "distributed.json", about | found)
    write_atomically(folder / "distributed.svg", model.draw(about | found))
    for row in found["layers"]:
        print(f"{row['ranks']} ranks {row['shape']:10} {row['provider']:26} {row['us']['median']:10.4g} us")
    print(folder / "distributed.json")


if __name__ == "__main__":
    main()
