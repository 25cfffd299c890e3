"""Operators that PyTorch and TensorFlow need for an LSTM, and the bytes of their arrays; neither computes anything.

PyTorch runs on its device ``meta``, whose tensors have shapes alone, and every operator that reaches a backend is noted
but those that return a view or fresh memory. `torch.nn.LSTMCell` is told by the operator that it takes on a GPU.
TensorFlow runs a graph of the usual functions on one CPU thread, optimised as it optimises graphs; what it did is its
own trace, without the operators that only rename, measure or reshape.

`torch.nn.LSTM` on a GPU, and Keras's LSTM, call cuDNN, whose launches nobody can count without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.harness.case import Case
from benchmarks.ops import bench_lstm
from benchmarks.peers import EPSILON

Counter = Callable[[Case], list[int]]
WITHOUT, WITH = (
    [case for case in bench_lstm.OP.cases if bool(bench_lstm.NORMS[case.direction]) == has] for has in (False, True)
)


def found() -> dict[str, tuple[str, Counter, list[Case]]]:
    """Return version, counter and cases of everything that is installed."""
    peers: dict[str, tuple[str, Counter, list[Case]]] = {}
    if find_spec("torch"):
        import torch

        version = torch.__version__.partition("+")[0]
        peers["PyTorch, LSTMCell"] = version, torch_cells, WITHOUT
        peers["PyTorch, F.batch_norm or F.layer_norm"] = version, torch_loop, WITH
    if find_spec("tensorflow"):
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # its fused operators are not on a GPU
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow

        peers["TensorFlow"] = tensorflow.__version__, tensorflow_graph, WITHOUT + WITH
    return peers


# ---- PyTorch --------------------------------------------------------------------------------------------------------


def torch_loop(case: Case) -> list[int]:
    """Return the bytes of the operators of a loop over PyTorch's norms."""
    import torch

    norm = bench_lstm.NORMS[case.direction]
    return _torch(case, lambda tensors: bench_lstm.torch_loop(torch, tensors, norm)[0])


def torch_cells(case: Case) -> list[int]:
    """Return the bytes of the operators of a loop over `torch.nn.LSTMCell`, as on a GPU."""
    import torch

    def layer(a: dict[str, Any]) -> Any:
        h, c, y = a["h0"], a["c0"], []
        for x in a["x"]:
            products = x @ a["weight_ih"].T, h @ a["weight_hh"].T
            h, c = torch.ops.aten._thnn_fused_lstm_cell(*products, c, a["bias"], torch.empty_like(a["bias"]))[:2]
            y.append(h)
        return torch.stack(y)

    return _torch(case, layer)


def _torch(case: Case, layer: Callable[[dict[str, Any]], Any]) -> list[int]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    calls: list[int] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if func.namespace == "aten" and not func.is_view and "empty" not in name and name != "_unsafe_view":
                leaves = tree_leaves((args, kwargs, result))
                different = {id(one): one for one in leaves if isinstance(one, torch.Tensor)}.values()
                calls.append(sum(min(one.nbytes, one.untyped_storage().nbytes()) for one in different))
            return result

    def empty(shape: tuple[int, ...]) -> np.ndarray:
        return np.empty(shape, case.dtype)

    arrays = bench_lstm.inputs(case, empty)
    tensors = {name: torch.from_numpy(array).to("meta") for name, array in arrays.items()}
    wanted = [tensors[name] for name in arrays if name not in ("x", "dy")]
    both = bench_lstm.is_both(case)
    with torch.set_grad_enabled(both):
        for tensor in wanted if both else ():
            tensor.requires_grad_()
        with Noting():
            y = layer(tensors)
            if both:
                torch.autograd.grad(y, wanted, tensors["dy"])
    return calls


# ---- TensorFlow -----------------------------------------------------------------------------------------------------

# Operators that move no numbers: constants and variables, other names, shapes and what is computed from them.
IDLE = frozenset(
    "BroadcastGradientArgs Cast Const ConcatOffset ExpandDims FloorDiv Identity IdentityN InvertPermutation NoOp Pack "
    "Placeholder PlaceholderWithDefault Prod Range Reshape Shape ShapeN Size Slice Squeeze StopGradient StridedSlice "
    "_Arg _HostRecv _HostSend _Recv _Retval _Send".split()
)
NUMBERS = ("Cast", "Pack", "Prod", "Slice", "StridedSlice")  # idle on integers alone, which are shapes


def tensorflow_graph(case: Case) -> list[int]:
    """Return the bytes of the operators that TensorFlow executes."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session(config=v1.ConfigProto(inter_op_parallelism_threads=1)) as session:
        arrays = bench_lstm.inputs(case, lambda shape: np.ones(shape, case.dtype))
        given = {name: v1.placeholder(array.dtype, array.shape) for name, array in arrays.items()}
        y = _layer(tf, given, bench_lstm.NORMS[case.direction])
        results = [y]
        if bench_lstm.is_both(case):
            wanted = [given[name] for name in arrays if name not in ("x", "dy")]
            results += tf.gradients(y, wanted, given["dy"])
        feed = {given[name]: array for name, array in arrays.items()}
        options = v1.RunOptions(trace_level=v1.RunOptions.FULL_TRACE, output_partition_graphs=True)
        metadata = v1.RunMetadata()
        session.run(results, feed, options=options, run_metadata=metadata)
    return _executed(tf, metadata)


def _layer(tf: Any, a: dict[str, Any], norm: str | None) -> Any:
    h, c, y = a["h0"], a["c0"], []

    def standardised(part: Any, gamma: Any, beta: Any = None) -> Any:
        mean, variance = tf.nn.moments(part, [0 if norm == "batch" else 1], keepdims=True)
        return tf.nn.batch_normalization(part, mean, variance, beta, gamma, EPSILON)

    for x in tf.unstack(a["x"]):
        parts = tf.matmul(x, a["weight_ih"], transpose_b=True), tf.matmul(h, a["weight_hh"], transpose_b=True)
        if norm:
            parts = standardised(parts[0], a["gamma_x"]), standardised(parts[1], a["gamma_h"])
        i, f, g, o = tf.split(tf.nn.bias_add(parts[0] + parts[1], a["bias"]), 4, axis=1)
        c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(g)
        h = tf.sigmoid(o) * tf.tanh(standardised(c, a["gamma_c"], a["beta_c"]) if norm else c)
        y.append(h)
    return tf.stack(y)


def _executed(tf: Any, metadata: Any) -> list[int]:
    """Return the bytes of every operator of a trace that moves numbers."""
    nodes = {node.name: node for graph in metadata.partition_graphs for node in graph.node}
    sizes: dict[str, dict[int, int]] = {}
    whole: dict[str, bool] = {}
    for device in metadata.step_stats.dev_stats:
        for stats in device.node_stats:
            described = {one.slot: one.tensor_description for one in stats.output}
            sizes[stats.node_name] = {slot: _bytes(tf, one) for slot, one in described.items()}
            whole[stats.node_name] = all(tf.dtypes.as_dtype(one.dtype).is_integer for one in described.values())
    calls = []
    for name in sizes:
        node = nodes.get(name)
        if node is None or (node.op in IDLE and (node.op not in NUMBERS or whole[name])):
            continue
        calls.append(sum(sizes[name].values()) + sum(_inputs(node.input, sizes)))
    return calls


def _inputs(names: Iterable[str], sizes: dict[str, dict[int, int]]) -> Iterable[int]:
    for name in dict.fromkeys(names):
        if not name.startswith("^"):
            source, _, slot = name.partition(":")
            yield sizes.get(source, {}).get(int(slot or 0), 0)


def _bytes(tf: Any, described: Any) -> int:
    return int(np.prod([axis.size for axis in described.shape.dim])) * tf.dtypes.as_dtype(described.dtype).size
