"""``bnkernels train-sequence``: an LSTM that classifies images read pixel by pixel or row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bnkernels.distributed.communicator import Communicator
from bnkernels.nn.containers import Sequential
from bnkernels.nn.linear import Linear
from bnkernels.nn.lstm import LSTM
from bnkernels.nn.norm_lstm import BatchNormLSTM, LayerNormLSTM
from bnkernels.nn.optimizers import Optimizer, clip_gradients
from bnkernels.runtime.arguments import empty
from bnkernels.runtime.registry import runtime_of
from bnkernels.train.engines import LayersEngine
from bnkernels.train.run_config import CHOICES, EVALUATION_ROWS, ConfigError, RunConfig, number, whole_number

READS = ("pixels", "rows")
PERMUTATIONS = ("none", "permutation", "replacement")
RATES = {"rmsprop": 1e-3, "adam": 1e-3}
PERMUTATION_DRAW, NOISE_DRAW = 1, 2  # beside the seed: generators apart from those of weights and examples
MOST_NUMBERS = 2**26  # gates of all steps that an evaluation holds at a time


@dataclass(frozen=True)
class SequenceConfig(RunConfig):
    """Everything that determines a run of an LSTM over images, and nothing else.

    Attributes
    ----------
    dataset, data, batch_size, norm, lr, epochs, steps, seed, models, dtype, device
        Options of every run, see `RunConfig`; all three networks, and 100 epochs where no length is given.
    optimizer : {"rmsprop", "adam"}
        Rule that turns gradients into steps.
    read : {"pixels", "rows"}
        Steps of a sequence: the features one by one, or the rows of a square image.
    permute : {"none", "permutation", "replacement"}
        Order of the pixels, fixed by the seed, the same for all examples: as they are; a permutation; or each place
        with a pixel drawn at random, as the code of the recurrent batch norm paper has it, which leaves 37 % of the
        pixels out and has others several times.
    hidden : int
        Number of hidden units.
    clip : float
        Largest norm of all gradients together, to which larger ones are scaled down; 0 leaves them as they are.
    noise : float
        Standard deviation of the noise that training adds to the first hidden state, which else is 0.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    command: ClassVar[str] = "train-sequence"
    choices: ClassVar[dict[str, tuple[str, ...]]] = CHOICES | {
        "optimizer": tuple(RATES),
        "read": READS,
        "permute": PERMUTATIONS,
    }
    rates: ClassVar[dict[str, float]] = RATES
    default_epochs: ClassVar[int] = 100

    norm: str = "all"
    optimizer: str = "rmsprop"
    read: str = "pixels"
    permute: str = "none"
    hidden: int = 100
    clip: float = 1.0
    noise: float = 0.1

    def _checked(self) -> dict[str, Any]:
        clip, noise = number("clip", self.clip, zero=True), number("noise", self.noise, zero=True)
        return super()._checked() | {"hidden": whole_number("hidden", self.hidden, 1), "clip": clip, "noise": noise}

    @property
    def name(self) -> str:
        """Beginning of the name of a run's folder."""
        return f"{self.dataset}-{self.read}"

    @property
    def rule(self) -> str:
        """The optimiser in words, with what is done to gradients and first state."""
        clip = f", gradients clipped to a norm of {self.clip:g}" if self.clip else ""
        return super().rule + clip + (f", noise of {self.noise:g} on h_0" if self.noise else "")

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the hidden layer."""
        return (self.hidden,)

    def shape(self, features: int) -> tuple[int, int]:
        """Return the number of steps, and of inputs of a step, that these many features are read in."""
        if self.read == "pixels":
            return features, 1
        side = math.isqrt(features)
        if side * side != features:
            raise ConfigError(
                f"read must be pixels for data of {features} features, got rows: only square images have rows"
            )
        return side, side

    def order(self, features: int) -> np.ndarray | None:
        """Return which pixel is read when; None if they are read in their own order."""
        rng = np.random.default_rng((self.seed, PERMUTATION_DRAW))
        draws = {"permutation": rng.permutation, "replacement": lambda count: rng.integers(0, count, count)}
        return draws[self.permute](features) if self.permute in draws else None

    def evaluation_rows(self, sizes: tuple[int, ...]) -> int:
        """Return how many examples are evaluated at a time: all their gates are in memory together."""
        steps, _ = self.shape(sizes[0])
        return min(EVALUATION_ROWS, max(1, MOST_NUMBERS // (steps * 4 * self.hidden)))

    def describe(self, sizes: tuple[int, ...]) -> str:
        """Return the network in words."""
        steps, inputs = self.shape(sizes[0])
        orders = {"none": "", "permutation": " in a random order", "replacement": " drawn with replacement"}
        of = f"{inputs} input{'s' if inputs > 1 else ''}{orders[self.permute]}"
        return f"LSTM of {self.hidden} units over {steps} steps of {of}, {sizes[-1]} classes"

    def numbers(self, sizes: tuple[int, ...], rows: int) -> int:
        """Return how many numbers parameters, gradients and the gates of all steps are."""
        steps, inputs = self.shape(sizes[0])
        parameters = 4 * self.hidden * (inputs + self.hidden) + (self.hidden + 1) * sizes[-1]
        gates = max(self.batch_size, rows) * steps * 4 * self.hidden
        return 2 * self.models * len(self.norms) * parameters + gates

    def weights(self, norm: str, sizes: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of each matrix of weights, and of the largest population statistics."""
        steps, inputs = self.shape(sizes[0])
        yield "0.weight_ih_l0", (4 * self.hidden, inputs)
        yield "0.weight_hh_l0", (4 * self.hidden, self.hidden)
        yield "1.weight", (sizes[-1], self.hidden)
        if norm == "batch":
            yield "0.running_mean_ih_l0", (steps, 4 * self.hidden)

    def make_model(
        self, norm: str, sizes: tuple[int, ...], xp: Any, seed: int, ranks: Communicator | None = None
    ) -> SequenceClassifier:
        """Return a network with fresh weights."""
        steps, inputs = self.shape(sizes[0])
        kinds = {"none": LSTM, "layer": LayerNormLSTM, "batch": BatchNormLSTM}
        rng, more = np.random.default_rng(seed), {"steps": steps} if norm == "batch" else {}
        lstm = kinds[norm](
            inputs,
            self.hidden,
            output="last",
            initial="identity",
            input_gradient=False,
            dtype=self.dtype,
            seed=rng,
            xp=xp,
            **more,
        )
        linear = Linear(self.hidden, sizes[-1], dtype=self.dtype, seed=rng, xp=xp)
        return SequenceClassifier(lstm, linear, sizes=sizes, steps=steps, order=self.order(sizes[0]))

    def make_engine(
        self, trained: Sequence[tuple[SequenceClassifier, Optimizer]], ranks: Communicator | None = None
    ) -> SequenceEngine:
        """Return the engine."""
        return SequenceEngine(trained, self)


class SequenceClassifier(Sequential):
    """An LSTM, and a linear layer behind its last step, on rows of features that are read as sequences.

    Parameters
    ----------
    lstm : LSTM
        Layer whose output is that of the last step.
    linear : Linear
        Layer of the classes.
    sizes : tuple of int
        Number of features, hidden units and classes.
    steps : int
        Number of steps in which the features are read.
    order : numpy.ndarray, shape (features,), optional
        Number of the feature that is read at each place; by default they are read as they come.
    """

    def __init__(
        self, lstm: LSTM, linear: Linear, *, sizes: tuple[int, ...], steps: int, order: np.ndarray | None = None
    ) -> None:
        super().__init__(lstm, linear)
        self.sizes, self.steps = sizes, steps
        self._order = None if order is None else self.xp.asarray(order)

    @property
    def dtype(self) -> np.dtype:
        """Data type of data and parameters."""
        return self.parameters["1.weight"].dtype

    def forward(self, x: Any, *, training: bool | None = None, mask: Any = None, state: Any = None) -> Any:
        """Return the logits.

        Parameters
        ----------
        x : array, shape (N, features)
            Examples. Never written.
        training : bool, optional
            Mode of this call; by default each layer has its own. False keeps nothing for a backward.
        mask : None
            No layer takes one.
        state : tuple of two arrays, shape (1, N, hidden), optional
            Hidden states and cells to begin with; by default 0.

        Returns
        -------
        array, shape (N, classes)
            Logits.
        """
        x = x if self._order is None else x[:, self._order]
        rows = x.reshape(len(x), self.steps, -1)
        sequences = empty(runtime_of(type(x)), (self.steps, len(x), rows.shape[2]), x)  # time first
        sequences[...] = rows.swapaxes(0, 1)
        lstm, linear = self.layers
        return linear.forward(lstm.forward(sequences, training=training, state=state), training=training)

    def state(self) -> dict[str, np.ndarray]:
        """Return copies of all arrays on the host, by name."""
        return self.state_dict()

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take all arrays from what `state` returned."""
        self.load_state_dict(state)


class SequenceEngine(LayersEngine):
    """Makes a step layer by layer, with noise on the first hidden state and clipped gradients."""

    config: SequenceConfig

    def forward(self, model: SequenceClassifier, x: Any, step: int) -> Any:
        """Return the logits of a mini-batch; the noise depends on seed and step only, so that a resumed run has it."""
        if not self.config.noise:
            return model.forward(x, training=True)
        rng = np.random.default_rng((self.config.seed, NOISE_DRAW, step))
        noise = rng.normal(0, self.config.noise, (1, len(x), model.sizes[1])).astype(model.dtype)
        h0, c0 = (empty(runtime_of(type(x)), noise.shape, x) for _ in range(2))
        h0[...], c0[...] = model.xp.asarray(noise), 0
        return model.forward(x, training=True, state=(h0, c0))

    def before_evaluation(self, x: Any) -> None:
        """Estimate population statistics anew, as means over all mini-batches at the weights of now.

        Exponential means over training are of other weights, and the steps of a sequence add up the difference.
        """
        batch = self.config.batch_size
        for model, optimizer in self.trained:
            lstm = model.layers[0]
            if not isinstance(lstm, BatchNormLSTM):
                continue
            momentum, lstm.momentum, lstm.batches = lstm.momentum, None, 0
            for step in range(len(x) // batch):
                self.forward(model, x[step * batch : (step + 1) * batch], step)
            lstm.momentum, lstm.batches = momentum, optimizer.steps

    def update(self, model: SequenceClassifier, optimizer: Optimizer) -> None:
        """Clip the gradients, and update the parameters from them."""
        if self.config.clip:
            clip_gradients(model, self.config.clip)
        optimizer.step()
