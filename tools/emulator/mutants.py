"""Plants bugs in the kernels, one at a time: the tests of the ops must notice every one of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .build import CUDA, CUDA_VARIABLE, ROOT, EmulatorError, read_sources, write_sources

BATCH_NORM = ("tests/ops/test_batch_norm.py", "tests/ops/test_batch_norm_layouts.py", "tests/regress")
COOPERATIVE = "tests/ops/test_batch_norm_cooperative.py", "tests/ops/test_batch_norm_cooperative_narrow.py"
DOUBLE = ("tests/ops/test_batch_norm_double_backward.py",)
OPTIONS = (
    *("tests/ops/test_batch_norm_masked.py", "tests/ops/test_batch_renorm.py", "tests/ops/test_batch_norm_groups.py"),
    *("tests/ops/test_batch_norm_statistics.py", "tests/ops/test_batch_norm_parameters.py"),
)
OVERFLOW = "tests/ops/test_sums_that_overflow.py"
MULTI_BLOCK = "tests/ops/test_fused_training_drawn.py", "tests/ops/test_fused_training_multi_block.py"
# Tests of headers, and of kernels for which `Mutant.tests` finds too many. The quickest first: a failure ends a run.
TESTS = {
    "lib/numbers/half.cuh": ("tests/ops/test_batch_norm_half.py", "tests/tools/test_hardware_twins.py"),
    "mini_batch.cu": ("tests/ops/test_mini_batch.py",),
    "lib/numbers/rsqrt.cuh": ("tests/tools/test_hardware_twins.py",),
    "lib/numbers/activation.cuh": ("tests/ops/test_batch_norm_activations.py", *DOUBLE),
    **dict.fromkeys(("lib/numbers/pair.cuh", "lib/reduce/rows.cuh"), BATCH_NORM),
    "lib/reduce/parts.cuh": (*BATCH_NORM, OVERFLOW),
    "lib/reduce/gradient_sums.cuh": (*BATCH_NORM, OVERFLOW),
    "lib/reduce/normalisation.cuh": (OVERFLOW, *BATCH_NORM),
    "batch_norm_backward.cu": (*BATCH_NORM, OVERFLOW),
    "batch_norm_forward.cu": (*BATCH_NORM, "tests/ops/test_running_statistics.py"),
    "lib/sync/grid_barrier.cuh": (*COOPERATIVE, "tests/ops/test_fused_training_multi_block.py"),
    **dict.fromkeys(
        (
            "lib/reduce/cooperative_slices.cuh",
            "lib/numbers/vector.cuh",
            "batch_norm_forward_cooperative.cu",
            "batch_norm_backward_cooperative.cu",
        ),
        (*COOPERATIVE, OVERFLOW),
    ),
    "lib/reduce/options.cuh": OPTIONS,
    **dict.fromkeys(
        ("fused_training.cu", "lib/train/block_step.cuh", "lib/gemm/subwarp.cuh"),
        (
            *(
                "tests/ops/test_fused_training_drawn.py",
                "tests/ops/test_fused_training.py",
                "tests/train/test_ensemble.py",
            ),
            "tests/ops/test_constant_channels.py",
        ),
    ),
    **dict.fromkeys(
        (
            "fused_training_multi_block.cu",
            "lib/train/multi_block_step.cuh",
            "lib/train/own_weights.cuh",
            "lib/train/multi_block_step_by_neuron.cuh",
            "lib/train/multi_block_step_by_example.cuh",
        ),
        MULTI_BLOCK,
    ),
    "lib/train/network.cuh": (*MULTI_BLOCK, "tests/train/test_ensemble.py"),
    **dict.fromkeys(
        (
            "lib/gemm/product.cuh",
            "lib/gemm/matrix.cuh",
            "lib/gemm/warp_rows.cuh",
            "linear_batch_norm_forward.cu",
            "linear_batch_norm_backward.cu",
        ),
        (
            "tests/ops/test_linear_batch_norm.py",
            "tests/ops/test_linear_layer_norm.py",
            "tests/ops/test_constant_channels.py",
            "tests/ops/test_sums_that_overflow.py",
        ),
    ),
    "lib/gemm/tensor_product.cuh": (
        *("tests/ops/test_tensor_product.py", "tests/ops/test_linear_batch_norm.py"),
        "tests/ops/test_linear_batch_norm_tf32x3.py",
    ),
    **dict.fromkeys(
        ("lib/reduce/vector_rows.cuh", "lib/reduce/row_moments.cuh", "lib/reduce/row_gradients.cuh"),
        ("tests/ops/test_layer_norm.py",),
    ),
    **dict.fromkeys(
        ("layer_norm_forward_cooperative.cu", "layer_norm_backward_cooperative.cu", "lib/reduce/shared_rows.cuh"),
        ("tests/ops/test_layer_norm_long_rows.py",),
    ),
    **dict.fromkeys(
        (
            *(f"lstm_{way}{kind}.cu" for way in ("forward", "backward") for kind in ("", "_cooperative")),
            *(f"lib/recurrent/lstm_{way}_step.cuh" for way in ("forward", "backward")),
            *("lib/recurrent/step_items.cuh", "lib/recurrent/step_statistic.cuh"),
        ),
        tuple(f"tests/ops/test_lstm{part}.py" for part in ("_launch", "", "_population")),
    ),
    "lib/reduce/sums.cuh": ("tests/ops/test_batch_norm.py", *DOUBLE),
    "lib/reduce/warp.cuh": ("tests/ops/test_softmax_cross_entropy.py", "tests/regress"),
}
TIME_LIMIT = 600  # seconds for the kernels as they are
SLOWER = 3  # a mutant that takes so many times as long hangs, which is noticed too
SHORTEST_LIMIT = 60  # seconds; compilation of a mutant included
AT_ONCE = 2
# Exit statuses of pytest and of `python -m tools.emulator run`.
PASSED, FAILED, REPORTED = 0, 1, 66
CRASHED = 256 - signal.SIGSEGV  # which the kernels as they are do not


@dataclass(frozen=True)
class Mutant:
    """One bug: in `file`, the text `original`, which occurs there exactly once, becomes `mutated`.

    It is tried on `builds` in turn until the tests notice. `select` narrows the tests down, as pytest's ``-k`` does;
    `among` names their files where they are not those of `file`.
    """

    name: str
    file: str
    original: str
    mutated: str
    builds: tuple[str, ...] = ("plain",)
    select: str = ""
    among: tuple[str, ...] = ()

    def sources(self, originals: dict[str, str]) -> dict[str, str]:
        """Return all sources with the bug in them."""
        count = originals.get(self.file, "").count(self.original)
        if count != 1:
            raise EmulatorError(f"{self.name}: expected once in cuda/{self.file}, found {count} times: {self.original}")
        return originals | {self.file: originals[self.file].replace(self.original, self.mutated)}

    def tests(self) -> tuple[str, ...]:
        """Return the tests that must notice: of ``cuda/X_forward.cu`` ``tests/ops/test_X*.py`` and regressions."""
        if self.among:
            return self.among
        if self.file in TESTS:
            return TESTS[self.file]
        op = re.sub(r"(_forward|_backward)?\.cu$", "", self.file)
        found = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"tests/ops/test_{op}*.py"))
        if not found:
            raise EmulatorError(f"{self.name}: cuda/{self.file} needs tests/ops/test_{op}*.py or a row in TESTS")
        return (*found, "tests/regress")


def check(mutants: list[Mutant]) -> int:
    """Run the tests on the unchanged kernels, then on every mutant; return 0 if all were caught."""
    originals = read_sources(CUDA)
    mutated = [mutant.sources(originals) for mutant in mutants]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        needed = sorted({(build, m.tests(), m.select) for m in mutants for build in m.builds})
        limits = {}
        for run, outcome in zip(needed, pool.map(lambda run: _run(originals, *run, TIME_LIMIT), needed), strict=True):
            if outcome.status != PASSED:
                print(f"the kernels as they are fail {run}:\n{outcome.text}")
                return 1
            limits[run] = max(SHORTEST_LIMIT, SLOWER * outcome.seconds)
        caught = sum(pool.map(lambda mutant, sources: _is_caught(mutant, sources, limits), mutants, mutated))
    print(f"{caught} of {len(mutants)} caught")
    return 0 if caught == len(mutants) else 1


@dataclass(frozen=True)
class _Outcome:
    status: int
    text: str
    seconds: float


def _is_caught(mutant: Mutant, sources: dict[str, str], limits: dict[tuple, float]) -> bool:
    """Try one mutant and print a line about it."""
    for build in mutant.builds:
        run = build, mutant.tests(), mutant.select
        outcome = _run(sources, *run, limits[run])
        if outcome.status not in (PASSED, FAILED, REPORTED, CRASHED) or "g++ does not compile" in outcome.text:
            print(f"NOT A VERDICT  {mutant.name} ({build}):\n{outcome.text}", flush=True)
            return False
        if outcome.status != PASSED:
            print(f"caught  {mutant.name} ({build})", flush=True)
            return True
    print(f"MISSED  {mutant.name} ({', '.join(mutant.builds)})", flush=True)
    return False


def _run(sources: dict[str, str], build: str, tests: tuple[str, ...], select: str, limit: float) -> _Outcome:
    """Run the fast tests of an op on one build of `sources`, up to the first failure."""
    marked = "emulator" if build == "plain" else "emulator and not slow"
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", marked]
    started = time.perf_counter()
    command = [sys.executable, "-m", "tools.emulator", "run", build, "--", *options, "-k", select, *tests]
    with tempfile.TemporaryDirectory() as folder:
        write_sources(sources, Path(folder))
        try:
            run = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | {CUDA_VARIABLE: folder},
                capture_output=True,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return _Outcome(FAILED, f"no end after {limit:.0f} seconds", limit)
    return _Outcome(run.returncode, run.stdout + run.stderr, time.perf_counter() - started)
