"""Features of batch norm, and the number of tests behind each: ``make features``, ``python -m tests.features``.

A line without tests is a feature that does not exist, and the command says so by its exit status.
"""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent


class Feature(NamedTuple):
    """A line of the table: a name, and what the names of its tests match."""

    name: str
    tests: str


FEATURES = [
    Feature("float32 and float64", r"test_batch_norm\.py.*float(32|64)"),
    Feature("float16 and bfloat16", r"test_batch_norm_(half|cooperative)\.py.*b?float16"),
    Feature("parameters in the data's 16 bits", r"parameters_in_16_bits"),
    Feature("gamma, beta absent", r"gamma_and_beta_are_optional"),
    Feature("channels in any axis", r"test_batch_norm_(layouts|cooperative)\.py.*(axis|channels_last|inner|extended)"),
    Feature("any strides, misaligned views", r"strides|views_give|no_vector_starts|no_strides_describe"),
    Feature("nine activations", r"test_batch_norm_activations\.py.*(relu|sigmoid|tanh|gelu|silu|elu|identity)"),
    Feature("NaN passes through every activation", r"nan_everywhere"),
    Feature("residual sum and its gradient", r"residual|test_a_small_device.*True"),
    Feature("inference and its backward", r"test_inference"),
    Feature("masked examples", r"test_batch_norm_masked\.py"),
    Feature("grouped statistics", r"test_batch_norm_groups\.py"),
    Feature("double backward", r"test_batch_norm_double_backward\.py"),
    Feature("running statistics: unbiased or biased", r"biased"),
    Feature("running statistics: plain average", r"(momentum|average).*None|None.*momentum|plain_average|cumulative"),
    Feature("renormalisation", r"test_batch_renorm\.py"),
    Feature("folding for inference", r"test_batch_norm_folding\.py"),
    Feature("statistics as ops of their own", r"test_batch_norm_statistics\.py"),
    Feature("out= and exact aliasing", r"out_may_be|in_place|in_the_place|may_replace|overlap"),
    Feature("CUDA graphs, streams, devices, threads", r"test_cuda_(runtime|workspace)\.py"),
    Feature("every byte once, 16 bytes an access", r"moved_once|16_bytes_at_a_time|test_traffic\.py"),
    Feature("errors that say the way out", r"test_batch_norm_errors\.py"),
    Feature("layers that own their arrays", r"test_(layers|containers|layer_objects|layer_errors)\.py"),
    Feature("PyTorch's checkpoints, in files too", r"test_state_dict\.py.*(pytorch|module|file|safetensors)"),
    Feature("modules of PyTorch", r"test_torch\w*\.py"),
    Feature("other frameworks' conventions", r"test_conventions\.py|like_another_framework"),
    Feature("bugs of others that must not be ours", r"tests/regress/"),
]


class Collected:
    """A plugin of pytest's that notes the names of the tests."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note them."""
        self.names = [item.nodeid for item in session.items]


def collect() -> list[str]:
    """Return the names of all tests."""
    collected = Collected()
    with redirect_stdout(io.StringIO()) as said:
        status = pytest.main(["--collect-only", "-qq", str(TESTS)], [collected])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests cannot be collected: {said.getvalue()[-2000:]}")
    return collected.names


def table(names: list[str]) -> list[tuple[str, int]]:
    """Return how many tests of these names stand behind each feature."""
    return [(feature.name, sum(bool(re.search(feature.tests, name)) for name in names)) for feature in FEATURES]


def main() -> int:
    """Print the table; return 0 if every feature has a test."""
    rows = table(collect())
    for name, count in rows:
        print(f"{name:44} {count:6} tests" if count else f"{name:44}      - not there yet")
    there = sum(count > 0 for _, count in rows)
    print(f"{there} of {len(rows)} features")
    return 0 if there == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
