"""cuDNN through its front end: a graph of batch norm and what follows it, of which cuDNN makes one plan per case.

cuDNN takes four axes. (N, C) is handed over as an image of one pixel, channels last; (N, C, L) as one of one row. In
the backward, ReLU's mask is found again from `x` alone; after a residual sum it is read, as the residual is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from benchmarks.harness.case import Arrays, Call, Case, NotSupportedError, Provider
from benchmarks.peers import EPSILON, MOMENTUM
from benchmarks.peers.pytorch import NEEDED, activate, in_memory_order, load, normalise_and_save, tensors_of
from benchmarks.peers.pytorch import absent as absent_pytorch

DATA_TYPES = {"float16": "HALF", "bfloat16": "BFLOAT16", "float32": "FLOAT", "float64": "DOUBLE"}


class Plan(NamedTuple):
    """A graph that is ready to run.

    Attributes
    ----------
    graph
        cuDNN's.
    symbols : dict of str to cudnn tensor
        Its inputs and outputs by name.
    workspace : int
        Bytes that it needs beside them.
    """

    graph: Any
    symbols: dict[str, Any]
    workspace: int


def absent() -> str | None:
    """Return why the front end cannot run, or None."""
    if find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    return absent_pytorch("cuda")


@cache
def library() -> ModuleType:
    """Return the front end."""
    load()  # PyTorch first: it brings the cuDNN that both use
    import cudnn

    return cudnn


@cache
def handle() -> Any:
    """Return the one handle of this process."""
    return library().create_handle()


def describe(case: Case, arrays: Arrays) -> str:
    """Return the versions."""
    cudnn = library()
    return f"cuDNN {cudnn.backend_version()}, front end {cudnn.__version__}"


def prepare(case: Case, arrays: Arrays) -> Call:
    """Prepare a case.

    Raises
    ------
    NotSupportedError
        If cuDNN has no plan for it; the message is cuDNN's.
    """
    tensors = tensors_of(case, arrays)
    prepare_direction = _forward if case.direction == "forward" else _backward
    return prepare_direction(case, tensors, plan_of(case, _layout(case, tensors["x"])))


def _layout(case: Case, x: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and strides of the data as cuDNN gets it."""
    image = _image(case, x)
    return tuple(image.shape), tuple(image.stride())


def _image(case: Case, tensor: Any) -> Any:
    """Return data as a view of four axes, (N, C, H, W); a vector as (1, C, 1, 1)."""
    if tensor.ndim == 1:
        return tensor.view(1, -1, 1, 1)
    if case.layout == "NC":
        return tensor.view(tensor.shape[0], 1, 1, tensor.shape[1]).permute(0, 3, 1, 2)
    return tensor.unsqueeze(2) if case.layout == "NCL" else tensor


def _forward(case: Case, tensors: dict[str, Any], plan: Plan) -> Call:
    """Prepare a forward."""
    torch = load()
    x, gamma, _, running_mean, running_var = (tensors[name] for name in NEEDED["forward"])
    y = torch.empty_like(x)
    buffers = tensors | {"y": y, "mean": torch.empty_like(gamma), "rstd": torch.empty_like(gamma)}
    buffers |= {"new_mean": running_mean, "new_var": running_var}
    run = _runner(case, plan, buffers)

    def call() -> tuple:
        run()
        return in_memory_order(case, y), running_mean, running_var

    return call


def _backward(case: Case, tensors: dict[str, Any], plan: Plan) -> Call:
    """Prepare a backward: the forward is computed here, by PyTorch."""
    torch = load()
    x, gamma, beta, _ = (tensors[name] for name in NEEDED["backward"])
    y, mean, rstd = normalise_and_save(x, gamma, beta)
    dx, dgamma, dbeta = (torch.empty_like(like) for like in (x, gamma, beta))
    buffers = tensors | {"mean": mean, "rstd": rstd, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
    outputs = [in_memory_order(case, dx), dgamma, dbeta]
    if case.epilogue == "add_relu":
        mask, dresidual = torch.empty_like(x, dtype=torch.bool), torch.empty_like(x)
        mask.copy_(activate(y, tensors["residual"], case.epilogue) > 0)
        buffers |= {"mask": mask, "dresidual": dresidual}
        outputs.append(in_memory_order(case, dresidual))
    run = _runner(case, plan, buffers)

    def call() -> tuple:
        run()
        return tuple(outputs)

    return call


def _runner(case: Case, plan: Plan, buffers: dict[str, Any]) -> Callable[[], None]:
    """Return what runs a plan on these buffers, on PyTorch's current stream."""
    torch, cudnn = load(), library()
    memory = torch.empty(max(plan.workspace, 1), dtype=torch.uint8, device=buffers["x"].device)
    accumulator = getattr(torch, case.accumulator)
    numbers = {"epsilon": EPSILON, "momentum": MOMENTUM}
    pack = {
        symbol: torch.full((1, 1, 1, 1), numbers[name], dtype=accumulator)  # on the host: passed by value
        if name in numbers
        else _image(case, buffers[name])
        for name, symbol in plan.symbols.items()
    }

    def run() -> None:
        cudnn.set_stream(handle=handle(), stream=torch.cuda.current_stream().cuda_stream)
        plan.graph.execute(pack, memory, handle=handle())

    return run


# ---- graphs ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def plan_of(case: Case, layout: tuple[tuple[int, ...], tuple[int, ...]]) -> Plan:
    """Return the plan that cuDNN's heuristics put first.

    Raises
    ------
    NotSupportedError
        If there is none.
    """
    cudnn = library()
    try:
        graph, symbols = graph_of(case, layout, handle=handle())
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
    except cudnn.cudnnGraphNotSupportedError as problem:
        raise NotSupportedError(f"cuDNN: {problem}") from problem
    return Plan(graph, symbols, graph.get_workspace_size())


def graph_of(case: Case, layout: tuple[tuple[int, ...], tuple[int, ...]], **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return a validated graph for a case, and its inputs and outputs by name."""
    cudnn = library()
    data, single = (getattr(cudnn.data_type, DATA_TYPES[name]) for name in (case.dtype, case.accumulator))
    graph = cudnn.pygraph(io_data_type=data, intermediate_data_type=single, compute_data_type=single, **options)
    channels = layout[0][1]
    vector = {"dim": [1, channels, 1, 1], "stride": [channels, 1, 1, 1], "data_type": single}
    image = {"dim": list(layout[0]), "stride": list(layout[1]), "data_type": data}
    number = {"dim": [1, 1, 1, 1], "stride": [1, 1, 1, 1], "data_type": single, "is_pass_by_value": True}
    declare = {"image": image, "vector": vector, "number": number}

    def inputs(kind: str, *names: str) -> dict[str, Any]:
        return {name: graph.tensor(name=name, **declare[kind]) for name in names}

    build = _forward_graph if case.direction == "forward" else _backward_graph
    symbols, images, vectors = build(cudnn, graph, case, inputs)
    for name, symbol in images.items():
        symbol.set_output(True).set_data_type(data).set_dim(image["dim"]).set_stride(image["stride"]).set_name(name)
    for name, symbol in vectors.items():
        symbol.set_output(True).set_data_type(single).set_name(name)
    graph.validate()
    return graph, symbols | images | vectors


def _forward_graph(cudnn: ModuleType, graph: Any, case: Case, inputs: Callable[..., dict]) -> tuple[dict, dict, dict]:
    """Return the inputs, the output images and the output vectors of a forward."""
    given = inputs("image", "x") | inputs("vector", "gamma", "beta", "running_mean", "running_var")
    given |= inputs("number", "epsilon", "momentum")
    y, mean, rstd, new_mean, new_var = graph.batchnorm(
        name="batch_norm",
        input=given["x"],
        scale=given["gamma"],
        bias=given["beta"],
        in_running_mean=given["running_mean"],
        in_running_var=given["running_var"],
        epsilon=given["epsilon"],
        momentum=given["momentum"],
    )
    if case.epilogue == "add_relu":
        given |= inputs("image", "residual")
        y = graph.add(name="add", a=y, b=given["residual"])
    if case.epilogue:
        y = graph.relu(name="relu", input=y)
    return given, {"y": y}, {"mean": mean, "rstd": rstd, "new_mean": new_mean, "new_var": new_var}


def _backward_graph(cudnn: ModuleType, graph: Any, case: Case, inputs: Callable[..., dict]) -> tuple[dict, dict, dict]:
    """Return the inputs, the output images and the output vectors of a backward."""
    given = inputs("image", "x", "dy") | inputs("vector", "gamma", "mean", "rstd")
    data = getattr(cudnn.data_type, DATA_TYPES[case.dtype])
    images, g = {}, given["dy"]
    x, gamma, mean, rstd = (given[name] for name in ("x", "gamma", "mean", "rstd"))
    if case.epilogue == "relu":
        given |= inputs("vector", "beta")
        y = graph.batchnorm_inference(
            name="again", input=x, mean=mean, inv_variance=rstd, scale=gamma, bias=given["beta"]
        )
        g = graph.relu_backward(name="drelu", loss=g, input=y)
        g.set_data_type(data)
    elif case.epilogue == "add_relu":
        given |= inputs("image", "mask")
        given["mask"].set_data_type(cudnn.data_type.BOOLEAN)
        g = graph.scale(name="drelu", input=g, scale=given["mask"])
        images["dresidual"] = g
    dx, dgamma, dbeta = graph.batchnorm_backward(
        name="batch_norm_backward", grad=g, input=x, scale=gamma, mean=mean, inv_variance=rstd
    )
    return given, images | {"dx": dx}, {"dgamma": dgamma, "dbeta": dbeta}


PROVIDERS = (Provider("cuDNN front end", "cuda", prepare, absent, engine="torch", describe=describe),)
