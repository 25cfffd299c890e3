"""Base of the norms: scale and shift, their types, and the statistics of the last forward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bnkernels.nn.layer import Leaf
from bnkernels.nn.options import activation_options, check_type
from bnkernels.nn.owner import array_module, data_type, vector
from bnkernels.nn.statistics import Statistics
from bnkernels.ops.activations import activation_named
from bnkernels.runtime import checks as check
from bnkernels.runtime.arguments import accumulator, empty
from bnkernels.runtime.registry import runtime_of


class Norm(Leaf):
    """Base of the norms. What they keep of a forward begins with its input and its statistics."""

    eps: float
    groups: int | None = None

    def _take(
        self,
        names: Sequence[str],
        shape: int | tuple[int, ...],
        options: Mapping[str, Any],
    ) -> None:
        """Make the parameters of these names; check and keep the options that all norms have."""
        kept, xp = accumulator(data_type(options["dtype"])), array_module(options["xp"])
        self.activation, self.alpha = options["activation"], options["alpha"]
        activation_named(self.activation, self.alpha)
        for name in names:
            self._parameters[name] = (xp.zeros if name == "bias" else xp.ones)(shape, kept)
        self.eps = check.epsilon(options["eps"], xp.zeros(1, kept))
        self._take_gradients(None)

    def _take_arrays(
        self, arrays: Mapping[str, Any], shape: tuple[int, ...], gradients: Mapping[str, Any] | None
    ) -> None:
        """Keep arrays for the parameters, the first of which is there; all have its type and lie beside it."""
        first = next(iter(arrays.values()))
        for name, array in arrays.items():
            if array is not None:
                self._parameters[name] = vector(name, array, shape, first.dtype, first)
        self._take_gradients(gradients)

    def _new_outputs(self, x: Any) -> tuple[Any, Any]:
        """Return new arrays: with ``out=`` calls are replayed, for freed memory comes back at the same addresses."""
        runtime, dtype, shape = runtime_of(type(x)), accumulator(x.dtype), self._statistics_of(x)
        if runtime is None:
            return np.empty(x.shape, x.dtype), np.empty(shape, dtype)
        return empty(runtime, x.shape, x), empty(runtime, shape, x, dtype)

    @abstractmethod
    def _statistics_of(self, x: Any) -> tuple[int, ...]:
        """Return the shape of the statistics of an input."""

    def _last_options(self) -> list[str]:
        """Return the options of the constructor that come last, as text."""
        return activation_options(self) + [f"dtype='{array.dtype}'" for array in [self.weight] if array is not None]

    @property
    def weight(self) -> Any:
        """Scale, or None."""
        return self._parameters.get("weight")

    @property
    def bias(self) -> Any:
        """Shift, or None."""
        return self._parameters.get("bias")

    gamma, beta = weight, bias

    @property
    def statistics(self) -> Statistics:
        """Statistics of the last input that was normalised by its own, by name; views."""
        if self._saved is None or self._saved[1] is None:
            raise RuntimeError(f"there are no statistics of an input: call this {type(self).__name__} in training")
        return Statistics(self._saved[1], self.eps, grouped=self._grouped)

    @property
    def _grouped(self) -> bool:
        """Whether statistics are of groups."""
        return self.groups is not None

    def _check(self, x: Any) -> None:
        """Check that an input has a data type for which the parameters and statistics are."""
        dtypes = {array.dtype for array in (*self._parameters.values(), *self._buffers.values())}
        storage = next((str(dtype) for dtype in dtypes if dtype.itemsize == 2), None)
        if storage is not None:
            check_type(self, x, storage)
        elif np.dtype(np.float64) in dtypes:
            check_type(self, x, "float64")
        elif dtypes:
            check_type(self, x, "float32", "float16", "bfloat16")

    def _vector_gradients(self, x: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """Return arrays for the gradients of scale and shift, which the op has whether there are these or not."""
        weight, bias = self._gradients.get("weight"), self._gradients.get("bias")
        if weight is None or bias is None:
            dtype = next((array.dtype for array in self._parameters.values()), accumulator(x.dtype))
            made = [empty(runtime_of(type(x)), shape, x, dtype) for _ in range(2)]
            weight, bias = (made[0] if weight is None else weight), (made[1] if bias is None else bias)
        return weight, bias

    def _dtype_of(self, name: str, data: np.dtype) -> np.dtype:
        return accumulator(data)
