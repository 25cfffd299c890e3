"""Synchronised batch normalisation as a layer, and the conversion of a model's batch norms."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from bnkernels.distributed.batch_norm import sync_batch_norm_backward, sync_batch_norm_forward
from bnkernels.distributed.communicator import Communicator, checked
from bnkernels.nn.batch_norm import BatchNorm
from bnkernels.nn.containers import Sequential
from bnkernels.nn.linear_batch_norm import LinearBatchNorm
from bnkernels.nn.norm_lstm import BatchNormLSTM
from bnkernels.runtime import checks as check

UNSHARED = "groups", "renorm", "allow_single"  # options of `BatchNorm`


class SyncBatchNorm(BatchNorm):
    """Batch normalisation over the mini-batch of all ranks; in evaluation it is `BatchNorm`.

    Parameters
    ----------
    num_features : int
        Number of channels, C.
    communicator : Communicator
        Ranks, which all have this layer and call it in the same order.
    name : str
        Name of the layer, the same on all ranks: one that differs raises an error at the first call.
    **options
        Options of `BatchNorm`, but for `groups`, `renorm` and `allow_single`.

    Attributes
    ----------
    communicator, name
        As given.

    Raises
    ------
    TypeError, ValueError
        If an argument is wrong.

    Notes
    -----
    `backward` writes this rank's part of the gradients of weight and bias, as other layers do of theirs: all of them
    are to be added up over the ranks, as `GradientExchange` does.

    Examples
    --------
    >>> import numpy as np
    >>> from bnkernels.distributed import run_threads
    >>> x = np.array([[1.0], [3.0], [8.0], [4.0]])
    >>> def work(ranks):
    ...     layer = SyncBatchNorm(1, communicator=ranks, dtype="float64")
    ...     return layer(x[2 * ranks.rank :][:2]), layer.running_mean
    >>> [running_mean.tolist() for _, running_mean in run_threads(2, work)]
    [[0.4], [0.4]]
    """

    def __init__(self, num_features: int, *, communicator: Communicator, name: str = "", **options: Any) -> None:
        self.communicator, self.name = checked(communicator), _name(name)
        for option in UNSHARED:
            if options.get(option):
                raise ValueError(f"{option} is an option of BatchNorm that ranks cannot share; drop it")
        super().__init__(num_features, **options)

    @classmethod
    def convert_sync_batchnorm(cls, model: Any, communicator: Communicator) -> Any:
        """Convert all batch norms of a model to synchronised ones, on the same arrays.

        Parameters
        ----------
        model : Layer
            Model; containers are changed in place. An `MLP` takes its communicator itself: ``MLP(communicator=...)``.
        communicator : Communicator
            Ranks, which all call this with the same model.

        Returns
        -------
        Layer
            The model, or in the place of a `BatchNorm` its conversion. Layers are named after their place.

        Raises
        ------
        TypeError
            If the model is no layer, or the communicator none.
        ValueError
            If a layer has batch statistics that ranks cannot share; nothing is changed then.
        """
        if not hasattr(model, "children"):
            raise TypeError(f"model must be a Layer of bnkernels.nn, got {check.shown(model)}; MLP takes communicator=")
        _check(model, "")
        return cls._converted(model, checked(communicator), "")

    @classmethod
    def _converted(cls, layer: Any, communicator: Communicator, name: str) -> Any:
        if isinstance(layer, SyncBatchNorm):
            layer.communicator, layer.name = communicator, name
        elif isinstance(layer, BatchNorm):
            converted = cls.__new__(cls)
            converted.__dict__.update(layer.__dict__)
            converted.communicator, converted.name = communicator, name
            converted._forget()
            return converted
        elif isinstance(layer, Sequential):
            numbers = list(layer.children)
            for place, (number, child) in enumerate(zip(numbers, layer.layers, strict=True)):
                layer.layers[place] = cls._converted(child, communicator, f"{name}.{number}" if name else number)
            layer._forget()
        return layer

    @classmethod
    def from_arrays(cls, *arrays: Any, **options: Any) -> SyncBatchNorm:
        """Return a layer that works on these arrays, and not on copies; see `BatchNorm.from_arrays`."""
        if options.get("renorm"):
            raise ValueError("renorm is an option of BatchNorm that ranks cannot share; drop it")
        return super().from_arrays(*arrays, **options)

    def _normalise(self, x: Any, *vectors: Any, grouped: bool, renorm: None, **options: Any) -> tuple[Any, Any]:
        return sync_batch_norm_forward(self.communicator, x, *vectors, name=self.name, **options)

    def _differentiate(self, *arrays: Any, grouped: bool, **options: Any) -> tuple[Any, ...]:
        return sync_batch_norm_backward(
            self.communicator, *arrays, name=self.name, meanwhile=self._do_the_rest, **options
        )

    @cached_property
    def rest(self) -> list[Callable[[], None]]:
        """Work that the backward of the layer above has left, done while this one waits for the other ranks."""
        return []

    def _do_the_rest(self) -> None:
        while self.rest:
            self.rest.pop(0)()

    def _options(self) -> list[str]:
        first, *others = super()._options()
        return [first, f"communicator={self.communicator!r}", *([f"name={self.name!r}"] if self.name else []), *others]


def _name(name: Any) -> str:
    """Check for the name of a layer; return it."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {check.shown(name)}")
    return name


def _check(layer: Any, name: str) -> None:
    """Refuse a model with batch statistics that stay those of a rank: a mixture would go unnoticed."""
    where = f"the layer {name or 'given'}, a {type(layer).__name__},"
    if isinstance(layer, LinearBatchNorm):
        raise ValueError(f"{where} has its statistics within one launch; take a Linear and a BatchNorm instead")
    if isinstance(layer, BatchNormLSTM):
        raise ValueError(f"{where} has statistics of its own at every time step, which ranks cannot share")
    if isinstance(layer, BatchNorm) and any(getattr(layer, option) for option in UNSHARED):
        raise ValueError(f"{where} has {', '.join(UNSHARED)}, or one of them, which ranks cannot share")
    for number, child in layer.children.items():
        _check(child, f"{name}.{number}" if name else number)
