"""Nodes of a capture, from a stand-in for the driver whose calls have the signatures of the driver API."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest

from benchmarks.harness import graph_nodes

KERNEL, COPY, FILL, HOST, EMPTY = 0, 1, 2, 3, 5


class _Driver:
    """A driver with one capture on stream 7, whose nodes are given by kind and name; nodes count from 100."""

    def __init__(self, *nodes: tuple[int, str], capturing: int = 1) -> None:
        self.nodes, self.capturing = nodes, capturing

    def cuStreamGetCaptureInfo_v2(self, stream, status, number, graph, dependencies, count) -> int:
        assert stream.value == 7
        assert number is dependencies is count is None
        status._obj.value, graph._obj.value = self.capturing, 9
        return 0

    def cuGraphGetNodes(self, graph, handles, count) -> int:
        assert graph.value == 9
        if handles is not None:
            assert count._obj.value == len(self.nodes)
            handles[:] = range(100, 100 + len(self.nodes))
        count._obj.value = len(self.nodes)
        return 0

    def cuGraphNodeGetType(self, node, kind) -> int:
        kind._obj.value = self.nodes[node.value - 100][0]
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node, parameters) -> int:
        parameters._obj.func = node.value + 1000
        return 0

    def cuFuncGetName(self, name, function) -> int:
        name._obj.value = self.nodes[function.value - 1100][1].encode()
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Put a driver in the place of NVIDIA's."""
    return lambda stand_in: monkeypatch.setattr(graph_nodes, "_driver", lambda: stand_in)


def test_kernels_copies_and_fills_are_counted_in_order(driver: Callable) -> None:
    driver(_Driver((KERNEL, "mean"), (FILL, ""), (HOST, ""), (KERNEL, "apply"), (EMPTY, ""), (COPY, "")))
    assert graph_nodes.count_nodes(7) == graph_nodes.Nodes(4, ("mean", "fill", "apply", "copy"))


def test_an_empty_capture_has_no_nodes(driver: Callable) -> None:
    driver(_Driver())
    assert graph_nodes.count_nodes(7) == graph_nodes.Nodes(0)


def test_a_driver_without_names_still_counts(driver: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_Driver, "cuFuncGetName")
    driver(_Driver((KERNEL, "mean"), (KERNEL, "apply")))
    assert graph_nodes.count_nodes(7) == graph_nodes.Nodes(2, ("kernel", "kernel"))


def test_a_kernel_of_a_library_has_its_name(driver: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_a_library(self: _Driver, node: ctypes.c_void_p, parameters: object) -> int:
        parameters._obj.kernel = node.value + 1000
        return 0

    monkeypatch.setattr(_Driver, "cuGraphKernelNodeGetParams_v2", of_a_library)
    monkeypatch.setattr(_Driver, "cuKernelGetName", _Driver.cuFuncGetName, raising=False)
    driver(_Driver((KERNEL, "mean")))
    assert graph_nodes.count_nodes(7).names == ("mean",)


def test_a_stream_that_is_not_captured_is_not_counted(driver: Callable) -> None:
    driver(_Driver((KERNEL, "mean"), capturing=0))
    nodes = graph_nodes.count_nodes(7)
    assert nodes.count is None
    assert "not being captured" in nodes.problem


def test_an_error_of_the_driver_is_the_problem(driver: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Driver, "cuGraphGetNodes", lambda *_: 901)
    driver(_Driver((KERNEL, "mean")))
    assert graph_nodes.count_nodes(7) == graph_nodes.Nodes(None, problem="cuGraphGetNodes answered 901")


def test_without_a_driver_nothing_is_counted(driver: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(graph_nodes, "_driver", missing)
    assert graph_nodes.count_nodes(7).problem.startswith("libcuda")


def test_the_parameters_have_the_layout_of_the_driver() -> None:
    """CUDA_KERNEL_NODE_PARAMS_v2: a function, seven 32-bit sizes, four pointers."""
    assert ctypes.sizeof(graph_nodes._KernelNode) == 8 + 7 * 4 + 4 + 4 * 8
    assert graph_nodes._KernelNode.parameters.offset == 40
