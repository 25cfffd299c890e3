"""What all tests share: GPU skips that can be forbidden, and a report of what was skipped and why."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from bnkernels.runtime import registry
from tools import backends
from tools.compile import nvrtc
from tools.emulator import EmulatorRuntime
from tools.emulator.build import BUILD_VARIABLE, BUILDS


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--every N``: a quick look."""
    parser.addoption("--every", type=int, default=1, metavar="N", help="run only every Nth of the chosen tests")


@pytest.hookimpl(trylast=True)  # of those that -m and -k leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the slow tests on several processors, where the last one to end decides."""
    items[:] = items[:: max(1, config.getoption("every"))]
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `cuda` where the kernels cannot run; fail it where BNKERNELS_REQUIRE_GPU=1 says they can."""
    if item.get_closest_marker("cuda") and (reason := registry.why_no_cuda()):
        if os.environ.get("BNKERNELS_REQUIRE_GPU") == "1":
            pytest.fail(f"BNKERNELS_REQUIRE_GPU=1, but {reason}", pytrace=False)
        pytest.skip(f"needs a GPU: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was skipped and why, one line per reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    terminalreporter.section("skipped, and why")
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:5} x {reason}")


@pytest.fixture(params=backends.PARAMETERS)
def backend(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    """Return each place an op runs in; afterwards nothing outside an emulated array may have been written."""
    yield backends.make(request.param)
    if request.param == "emulator":
        backends.emulated_runtime().check_guards()


@pytest.fixture
def emulated() -> Iterator[EmulatorRuntime]:
    """Return the emulator, with no launches yet; afterwards nothing outside its arrays may have been written."""
    runtime = backends.emulated_runtime()
    runtime.reset()
    yield runtime
    runtime.check_guards()


@pytest.fixture
def torch() -> ModuleType:
    """Return PyTorch, which says what its users expect; skip where it is not installed or a sanitizer is at work."""
    if BUILDS[os.environ.get(BUILD_VARIABLE, "plain")].sanitizer:
        pytest.skip("PyTorch does not run under a sanitizer")
    return pytest.importorskip("torch")


@pytest.fixture(name="nvrtc", scope="session")
def _nvrtc() -> ModuleType:
    """Return what compiles kernels; skip where no compiler has been installed, not where one of them is missing."""
    if not nvrtc.FOLDER.is_dir():
        pytest.skip(f"NVRTC is not installed: no {nvrtc.FOLDER}; python3 tools/install.py test puts it there")
    return nvrtc


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Return random numbers seeded by the test's name."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def counting_emulator(emulated: EmulatorRuntime) -> EmulatorRuntime:
    """Return the emulator, of a build that sees accesses."""
    if emulated.build not in ("plain", "coverage"):
        pytest.skip(f"the build {emulated.build!r} does not count accesses")
    return emulated
