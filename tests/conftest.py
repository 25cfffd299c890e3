"""Fixtures and hooks of all tests: GPU skips that can be forbidden, and a report of what was skipped and why."""

from __future__ import annotations

import gc
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from bnkernels.runtime import registry
from tools import backends, real_torch
from tools.compile import nvrtc
from tools.emulator import EmulatorRuntime
from tools.emulator.build import BUILD_VARIABLE

LEFT_OUT = pytest.StashKey[Counter]()  # tests that were not even started, by reason


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--every N``: a quick look."""
    parser.addoption("--every", type=int, default=1, metavar="N", help="run only every Nth of the chosen tests")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the quick tests of the ops themselves: what only the layers above them happen to execute is not tested."""
    names = {mark.name for mark in item.iter_markers()}
    if item.path.parent.name in ("ops", "regress") and "emulator" in names and not names & {"slow", "plain_build"}:
        item.add_marker("covered")


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out and count the tests that need a GPU where none is; begin with the slow ones on several processors."""
    need_a_gpu = [item for item in items if item.get_closest_marker("cuda")]
    if need_a_gpu and os.environ.get("BNKERNELS_REQUIRE_GPU") != "1" and (reason := registry.why_no_cuda()):
        items[:] = [item for item in items if item.get_closest_marker("cuda") is None]
        left_out(config)[f"needs a GPU: {reason}"] = len(need_a_gpu)
    items[:] = items[:: max(1, config.getoption("every"))]
    if "PYTEST_XDIST_WORKER" in os.environ:  # where the last one to end decides
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Let no garbage collection look through the collected tests again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test marked `cuda` where BNKERNELS_REQUIRE_GPU=1 says that the kernels can run, and they cannot.

    Skip one marked `plain_build` in another build of the emulator.
    """
    build = os.environ.get(BUILD_VARIABLE, "plain")
    if item.get_closest_marker("plain_build") and build != "plain":
        pytest.skip(f"the build {build!r} makes other code of the kernels")
    if item.get_closest_marker("cuda") and (reason := registry.why_no_cuda()):
        pytest.fail(f"BNKERNELS_REQUIRE_GPU=1, but {reason}", pytrace=False)


def left_out(config: pytest.Config) -> Counter[str]:
    """Return the counts of tests that are not even started, by reason."""
    return config.stash.setdefault(LEFT_OUT, Counter())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the counts from a process of pytest-xdist to its parent, which collects nothing itself."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(left_out(session.config))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the counts of such a process: each of them collects everything."""
    node.config.stash[LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what did not run and why, one line per reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    reasons += left_out(terminalreporter.config)
    if not reasons:
        return
    terminalreporter.section("skipped, and why")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:5} x {reason}")


@pytest.fixture(params=backends.PARAMETERS)
def backend(request: pytest.FixtureRequest) -> Iterator[backends.Backend]:
    """Return each place an op runs in; afterwards nothing outside an emulated array may have been written."""
    with backends.entered(request.param) as backend:
        yield backend
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
    return real_torch.load()


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
