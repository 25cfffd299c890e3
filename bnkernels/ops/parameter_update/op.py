"""One optimiser step over all numbers of an array at once: SGD, momentum, RMSProp, Adam. In place, one launch."""

from __future__ import annotations

import math
from types import ModuleType

from bnkernels.ops.parameter_update import reference
from bnkernels.runtime import checks as check
from bnkernels.runtime import seam as rt
from bnkernels.runtime.arguments import SUFFIX, addresses, arguments_type, pack
from bnkernels.runtime.arrays import Array
from bnkernels.runtime.cpu import kernels
from bnkernels.runtime.operands import Operands
from bnkernels.runtime.replay import NEW, Call, ReplayCache

CPU = "bnkernels.ops.parameter_update.cpu"
ARGUMENTS = arguments_type(
    "parameters gradients first second scalars",
    "size vectors",
    "lr beta1 beta2 one_minus_beta1 one_minus_beta2 eps correction1 root_correction2",
    "",
)
THREADS, VECTOR = 256, 16
MAX_BLOCKS = 1024  # several per multiprocessor of the largest GPU; threads stride over the rest
MOMENTUM, BETA1, BETA2, ADAM_EPS = 0.9, 0.9, 0.999, 1e-8  # the usual ones
DECAY, RMSPROP_EPS = 0.9, 1e-8
BELOW_ONE = math.nextafter(1, 0)
STATES = {"sgd": (), "momentum": ("velocity",), "adam": ("first", "second")}
USUAL = {"sgd": (), "momentum": (MOMENTUM,), "adam": (BETA1, BETA2, ADAM_EPS)}
CONSTANTS = {  # members beta1 to eps of the argument
    "sgd": (0, 0, 0, 0, 0),
    "momentum": (MOMENTUM, 0, 0, 0, 0),
    "adam": (BETA1, BETA2, 1 - BETA1, 1 - BETA2, ADAM_EPS),
}


def check_shapes(args: dict[str, check.Argument | None]) -> None:
    """Refuse arrays of other shapes or data types than the parameters."""
    parameters = args["parameters"]
    check.float32_or_float64(parameters)
    for name, argument in args.items():
        check.contiguous(argument, (3,) if name == "scalars" else parameters.shape, parameters.dtype)


OPERANDS = {
    name: Operands(f"parameters {' '.join(state)}", "gradients", check_shapes)
    for name, state in (STATES | {"rmsprop": ("square",)}).items()
}
SGD_CALLS, MOMENTUM_CALLS, RMSPROP_CALLS, ADAM_CHECKS = (ReplayCache() for _ in range(4))


def sgd_update(parameters: Array, gradients: Array, *, lr: float) -> None:
    """Subtract `lr` times the gradients from the parameters, in place.

    Parameters
    ----------
    parameters : array, float32 or float64
        Parameters of any shape, updated in place; C order.
    gradients : array, shape and dtype of `parameters`
        Gradients; C order. Never written.
    lr : float
        Learning rate, per step.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Examples
    --------
    >>> import numpy as np
    >>> p = np.array([1.0, 2.0])
    >>> sgd_update(p, np.array([1.0, -1.0]), lr=0.5)
    >>> p
    array([0.5, 2.5])
    """
    call = SGD_CALLS.replay((parameters,), (gradients,), lr)
    if call.replayed:
        return
    lr = check.number("lr", lr, 0)
    runtime, _ = OPERANDS["sgd"].check(parameters, gradients)
    if runtime is not None:
        launch_update(runtime, call, "sgd", (parameters, gradients, None, None, None), (lr, *CONSTANTS["sgd"], 1, 1))
    else:
        update = on_numpy().sgd
        call.compute(lambda arrays: update(*arrays, lr), (parameters, gradients))


def momentum_update(
    parameters: Array, gradients: Array, velocity: Array, *, lr: float, momentum: float = MOMENTUM
) -> None:
    """Add the gradients to the decayed velocity and subtract `lr` times it from the parameters, in place.

    Parameters
    ----------
    parameters : array, float32 or float64
        Parameters of any shape, updated in place; C order.
    gradients : array, shape and dtype of `parameters`
        Gradients; C order. Never written.
    velocity : array, shape and dtype of `parameters`
        Decayed sum of the gradients, updated in place; starts at 0.
    lr : float
        Learning rate, per step.
    momentum : float
        Decay of the velocity at each step, between 0 and 1.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Examples
    --------
    >>> import numpy as np
    >>> p, v = np.array([1.0]), np.array([2.0])
    >>> momentum_update(p, np.array([1.0]), v, lr=0.5, momentum=0.5)
    >>> p, v
    (array([0.]), array([2.]))
    """
    call = MOMENTUM_CALLS.replay((parameters, velocity), (gradients,), lr, momentum)
    if call.replayed:
        return
    lr, momentum = check.number("lr", lr, 0), check.number("momentum", momentum, 0, 1)
    runtime, _ = OPERANDS["momentum"].check(parameters, velocity, gradients)
    if runtime is not None:
        arrays = parameters, gradients, velocity, None, None
        launch_update(runtime, call, "momentum", arrays, (lr, momentum, 0, 0, 0, 0, 1, 1))
    else:
        update = on_numpy().momentum
        call.compute(lambda arrays: update(*arrays, lr, momentum), (parameters, velocity, gradients))


def rmsprop_update(
    parameters: Array,
    gradients: Array,
    square: Array,
    *,
    lr: float,
    decay: float = DECAY,
    eps: float = RMSPROP_EPS,
) -> None:
    """Make one RMSProp step, in place: divide the gradients by the root of the decayed mean of their squares.

    Parameters
    ----------
    parameters : array, float32 or float64
        Parameters of any shape, updated in place; C order.
    gradients : array, shape and dtype of `parameters`
        Gradients; C order. Never written.
    square : array, shape and dtype of `parameters`
        Decayed mean of the squares of the gradients, updated in place; starts at 0.
    lr : float
        Learning rate, per step.
    decay : float
        Decay of `square` at each step, at least 0 and less than 1. PyTorch calls it `alpha`, with the default 0.99.
    eps : float
        Number added to the root of `square`, in the units of the gradients. With 0, a parameter whose gradients have
        all been 0 becomes NaN.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Notes
    -----
    `square` begins at 0 and, other than Adam's, is not corrected for that: the first step is
    ``lr / sqrt(1 - decay)`` long. It becomes infinite, and stays so, when ``(1 - decay) * gradients**2`` is out of the
    range of the data type; the parameter then moves no more.

    References
    ----------
    .. [1] T. Tieleman and G. Hinton, "Lecture 6.5, RMSProp", COURSERA: Neural Networks for Machine Learning, 2012.

    Examples
    --------
    >>> import numpy as np
    >>> p, square = np.array([1.0]), np.zeros(1)
    >>> rmsprop_update(p, np.array([5.0]), square, lr=0.25, decay=0.75)
    >>> p.round(6), square
    (array([0.5]), array([6.25]))
    """
    call = RMSPROP_CALLS.replay((parameters, square), (gradients,), lr, decay, eps)
    if call.replayed:
        return
    lr, eps = check.number("lr", lr, 0), check.number("eps", eps, 0)
    decay = check.number("decay", decay, 0, BELOW_ONE)
    runtime, _ = OPERANDS["rmsprop"].check(parameters, square, gradients)
    if runtime is not None:
        arrays = parameters, gradients, square, None, None
        launch_update(runtime, call, "rmsprop", arrays, (lr, decay, 0, 1 - decay, 0, eps, 1, 1))
    else:
        update = on_numpy().rmsprop
        call.compute(lambda arrays: update(*arrays, lr, decay, eps), (parameters, square, gradients))


def adam_update(
    parameters: Array,
    gradients: Array,
    first: Array,
    second: Array,
    *,
    step: int,
    lr: float,
    beta1: float = BETA1,
    beta2: float = BETA2,
    eps: float = ADAM_EPS,
) -> None:
    """Make one Adam step, in place.

    Parameters
    ----------
    parameters : array, float32 or float64
        Parameters of any shape, updated in place; C order.
    gradients : array, shape and dtype of `parameters`
        Gradients; C order. Never written.
    first, second : array, shape and dtype of `parameters`
        Decayed means of the gradients and of their squares, updated in place; both start at 0.
    step : int
        Number of this step, from 1.
    lr : float
        Learning rate, per step.
    beta1, beta2 : float
        Decay of `first` and `second` at each step, at least 0 and less than 1.
    eps : float
        Number added to the root of `second`, in the units of the gradients. With 0, a parameter whose gradients have
        all been 0 becomes NaN.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong; nothing is written then.

    Notes
    -----
    As PyTorch's, this computes ``sqrt(second) / sqrt(1 - beta2**step)``, which is within the range of the data type
    wherever `second` is. That becomes infinite, and stays so, when ``(1 - beta2) * gradients**2`` is out of range: in
    float32 from a gradient of 5.8e20 on. The parameter then moves no more.

    References
    ----------
    .. [1] D. P. Kingma and J. Ba, "Adam", 2015, arXiv:1412.6980, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> p, first, second = np.array([1.0]), np.zeros(1), np.zeros(1)
    >>> adam_update(p, np.array([5.0]), first, second, step=1, lr=0.25)
    >>> p.round(6)
    array([0.75])
    """
    step = check.integer("step", step, 1, 2**63 - 1)
    # No two steps are equal, but on NumPy arrays all that is checked may be.
    call = ADAM_CHECKS.replay((parameters, first, second), (gradients,), lr, beta1, beta2, eps)
    if not call.replayed:
        lr, eps = check.number("lr", lr, 0), check.number("eps", eps, 0)
        beta1, beta2 = check.number("beta1", beta1, 0, BELOW_ONE), check.number("beta2", beta2, 0, BELOW_ONE)
        runtime, _ = OPERANDS["adam"].check(parameters, first, second, gradients)
        if runtime is not None:
            scalars = lr, beta1, beta2, 1 - beta1, 1 - beta2, eps, *_corrections(step, beta1, beta2)
            launch_update(runtime, NEW, "adam", (parameters, gradients, first, second, None), scalars)
            return
        call.compute(lambda arrays: None, (parameters, first, second, gradients))
    factors = float(lr), float(beta1), float(beta2), float(eps), *_corrections(step, beta1, beta2)
    on_numpy().adam(parameters, first, second, gradients, *factors)


def _corrections(step: int, beta1: float, beta2: float) -> tuple[float, float]:
    """Return the divisors of the first moment and of the root of the second one."""
    return 1 - beta1**step, math.sqrt(1 - beta2**step)


def parameter_update_launch(units: int) -> rt.Launch:
    """Return the launch for at least one vector or parameter.

    Examples
    --------
    >>> parameter_update_launch(1530 // 4)
    Launch(grid=(2, 1, 1), block=(256, 1, 1), shared_bytes=0, cooperative=False)
    """
    return rt.Launch((min(rt.ceil_div(units, THREADS), MAX_BLOCKS), 1, 1), (THREADS, 1, 1))


def on_numpy() -> ModuleType:
    """Return what computes NumPy arrays."""
    return kernels(CPU) or reference


def launch_update(runtime: rt.Runtime, call: Call, rule: str, arrays: tuple, scalars: tuple[float, ...]) -> None:
    """Launch the kernel of a rule: parameters, gradients, state and schedule, and the numbers of the argument."""
    parameters = arrays[0]
    if parameters.size == 0:
        return
    places, size = addresses(runtime, *arrays), parameters.size
    aligned = not any(place % VECTOR for place in places[:4])  # the scalars are read one by one
    vectors = size * parameters.dtype.itemsize // VECTOR if aligned else 0
    arguments = pack(ARGUMENTS[parameters.dtype], *places, size, vectors, *scalars)
    kernel = f"bnk_parameter_update_{rule}_{SUFFIX[parameters.dtype]}"
    call.launch(runtime, "parameter_update", kernel, parameter_update_launch(vectors or size), arguments, parameters)
