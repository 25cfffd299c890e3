"""Nodes of a CUDA graph under capture, as the driver tells them: launches, copies, fills."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

_KINDS = {0: "kernel", 1: "copy", 2: "fill"}  # CUgraphNodeType; everything else costs nothing on the device


class Nodes(NamedTuple):
    """The nodes that cost something.

    Attributes
    ----------
    count : int or None
        Number of nodes; None where the driver could not be asked.
    names : tuple of str
        Names of the kernels in the order of the capture, for copies and fills the kind.
    problem : str
        Why nothing was counted, else empty.
    """

    count: int | None
    names: tuple[str, ...] = ()
    problem: str = ""


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2 of the driver API."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("parameters", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _checked(name: str, *arguments: object) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status != 0:
        raise OSError(f"{name} answered {status}")


def count_nodes(stream: int) -> Nodes:
    """Return what the capture on a stream has recorded so far.

    Parameters
    ----------
    stream : int
        Its address.
    """
    try:
        nodes = list(_nodes(stream))
    except (OSError, AttributeError) as error:
        return Nodes(None, problem=str(error))
    return Nodes(len(nodes), tuple(nodes))


def _nodes(stream: int) -> list[str]:
    status, graph = ctypes.c_int(), ctypes.c_void_p()
    information = (ctypes.c_void_p(stream), ctypes.byref(status), None, ctypes.byref(graph), None, None)
    _checked("cuStreamGetCaptureInfo_v2", *information)
    if status.value != 1:
        raise OSError(f"the stream is not being captured (status {status.value})")
    count = ctypes.c_size_t()
    _checked("cuGraphGetNodes", graph, None, ctypes.byref(count))
    handles = (ctypes.c_void_p * count.value)()
    _checked("cuGraphGetNodes", graph, handles, ctypes.byref(count))
    return [name for handle in handles[: count.value] if (name := _name(ctypes.c_void_p(handle)))]


def _name(node: ctypes.c_void_p) -> str:
    """Return what a node is called, or nothing if it costs nothing."""
    kind = ctypes.c_int()
    _checked("cuGraphNodeGetType", node, ctypes.byref(kind))
    if kind.value != 0:
        return _KINDS.get(kind.value, "")
    parameters, name = _KernelNode(), ctypes.c_char_p()
    try:
        _checked("cuGraphKernelNodeGetParams_v2", node, ctypes.byref(parameters))
        if parameters.func:
            _checked("cuFuncGetName", ctypes.byref(name), ctypes.c_void_p(parameters.func))
        else:  # a kernel of a library, loaded for no context in particular
            _checked("cuKernelGetName", ctypes.byref(name), ctypes.c_void_p(parameters.kernel))
    except (OSError, AttributeError):  # a driver older than CUDA 12.3 knows no names; it is a kernel all the same
        return "kernel"
    return (name.value or b"kernel").decode()
