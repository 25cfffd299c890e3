"""The layer of synchronised batch norm, the conversion of a model, and training steps shared by ranks."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

import numpy as np
import pytest

import bnkernels as bn
from bnkernels import nn
from bnkernels.distributed import Communicator, GradientExchange, OneRank, RankError, run_threads

SHARDS = [(0, 11), (11, 40)]


def make_model(seed: int = 0) -> nn.Sequential:
    """Return a network with a batch norm at the top and one inside a residual block."""
    rng = np.random.default_rng(seed)
    options = {"bias": False, "dtype": "float64", "seed": rng}
    block = nn.Residual(nn.Linear(5, 5, **options), nn.BatchNorm(5, activation="relu", dtype="float64"))
    first = nn.Linear(3, 5, **options), nn.BatchNorm(5, activation="tanh", dtype="float64")
    return nn.Sequential(*first, block, nn.Linear(5, 4, dtype="float64", seed=rng))


def trained(model: nn.Sequential, x: np.ndarray, labels: np.ndarray, exchange: Any = None, share: float = 1.0) -> None:
    """Make three steps."""
    optimiser = nn.SGD(model, lr=0.2)
    for _ in range(3):
        _, dlogits = bn.softmax_cross_entropy(model(x), labels)
        model.backward(share * dlogits)
        if exchange is not None:
            exchange(1)
        optimiser.step()


def test_ranks_train_a_converted_model_as_one_trains_the_model(rng: np.random.Generator) -> None:
    x, labels = rng.standard_normal((40, 3)), rng.integers(0, 4, 40).astype("int32")
    alone = make_model()
    trained(alone, x, labels)

    def work(ranks: Communicator) -> dict[str, np.ndarray]:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(make_model(), ranks)
        _, gradients = model.flatten()
        start, end = SHARDS[ranks.rank]
        trained(model, x[start:end], labels[start:end], GradientExchange(ranks, [gradients]), (end - start) / 40)
        return model.state_dict()

    first, second = run_threads(2, work)
    for name, right in alone.state_dict().items():
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_allclose(first[name], right, rtol=1e-10, atol=1e-12)


def test_conversion_keeps_arrays_and_names_layers_after_their_place() -> None:
    model = make_model()
    before = dict(model.parameters | model.buffers)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model, OneRank())
    assert converted is model
    norms = model[1], model[2][1]
    assert [type(norm) for norm in norms] == [nn.SyncBatchNorm] * 2
    assert [norm.name for norm in norms] == ["1", "2.1"]
    assert norms[1].activation == "relu"
    after = model.parameters | model.buffers
    assert all(after[name] is array for name, array in before.items())
    alone = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm(3, momentum=None, axis=-1), OneRank())
    assert (alone.momentum, alone.axis, alone.num_features) == (None, -1, 3)
    again = OneRank()
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model, again)[1].communicator is again


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.LinearBatchNorm(3, 5), "a LinearBatchNorm, has its statistics within one launch"),
        (nn.BatchNormLSTM(3, 5, steps=4), "a BatchNormLSTM, has statistics of its own at every time step"),
        (nn.BatchNorm(5, groups=2), "groups"),
        (nn.BatchNorm(5, renorm=(3.0, 5.0)), "renorm"),
    ],
)
def test_what_ranks_cannot_share_is_refused_and_nothing_changed(layer: nn.Layer, text: str) -> None:
    model = nn.Sequential(nn.BatchNorm(3), nn.Sequential(layer))
    with pytest.raises(ValueError, match=r"the layer 1\.0, ") as raised:
        nn.SyncBatchNorm.convert_sync_batchnorm(model, OneRank())
    assert text in str(raised.value)
    assert type(model[0]) is nn.BatchNorm


def test_options_that_ranks_cannot_share_are_refused() -> None:
    for option in ({"groups": 2}, {"renorm": (3.0, 5.0)}, {"allow_single": True}):
        with pytest.raises(ValueError, match=next(iter(option))):
            nn.SyncBatchNorm(3, communicator=OneRank(), **option)
    with pytest.raises(ValueError, match="renorm"):
        nn.SyncBatchNorm.from_arrays(np.ones(3), communicator=OneRank(), renorm=(3.0, 5.0))
    with pytest.raises(TypeError, match="communicator must be a Communicator"):
        nn.SyncBatchNorm(3, communicator=None)
    with pytest.raises(TypeError, match="name must be a str"):
        nn.SyncBatchNorm(3, communicator=OneRank(), name=3)
    with pytest.raises(TypeError, match="model must be a Layer"):
        nn.SyncBatchNorm.convert_sync_batchnorm(np.ones(3), OneRank())
    with pytest.raises(ValueError, match="communicator is for the statistics of batch norms"):
        nn.MLP((3, 5, 2), norm="layer", communicator=OneRank())


def test_in_evaluation_nothing_is_exchanged(rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 3)).astype("float32")

    def work(ranks: Communicator) -> tuple[np.ndarray, np.ndarray]:
        layer = nn.SyncBatchNorm(3, communicator=ranks).eval()
        if ranks.rank == 0:
            assert layer.backward(layer(x)).shape == (6, 3)
        return layer(x, training=False)

    found = run_threads(2, work, timeout=5)
    right = nn.BatchNorm(3)(x, training=False)
    np.testing.assert_array_equal(found, [right, right])


def test_layers_in_another_order_are_an_error_on_all_ranks() -> None:
    messages = []

    def work(ranks: Communicator) -> None:
        layers = [nn.SyncBatchNorm(3, communicator=ranks, name=name) for name in "ab"]
        x = np.ones((4, 3), "float32")
        with pytest.raises(RankError) as raised:
            layers[ranks.rank](x)
        messages.append(str(raised.value))

    run_threads(2, work, timeout=20)
    assert messages[0] == messages[1]
    assert "layer 'a'" in messages[0]
    assert "layer 'b'" in messages[0]


def test_a_copy_has_the_same_ranks_and_a_pickle_is_refused() -> None:
    ranks = OneRank()
    layer, model = nn.SyncBatchNorm(3, communicator=ranks, name="n"), nn.MLP((3, 5, 2), communicator=ranks)
    assert copy.deepcopy(layer).communicator is ranks
    assert [type(each) for each in copy.deepcopy(model).layers] == [nn.Linear, nn.SyncBatchNorm, nn.Linear]
    assert copy.deepcopy(model).astype("float64").layers[1].communicator is ranks
    for thing in (layer, model):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(thing)
    assert "communicator=<OneRank: rank 0 of 1>, name='n'" in repr(layer)


def test_ranks_train_an_mlp_as_one_trains_it(rng: np.random.Generator) -> None:
    x, labels = rng.standard_normal((40, 3)), rng.integers(0, 2, 40).astype("int32")
    options = {"dtype": "float64", "activation": "tanh"}

    def step(model: nn.MLP, start: int, end: int, exchange: Any) -> np.ndarray:
        _, dlogits = bn.softmax_cross_entropy(model.forward(x[start:end], training=True), labels[start:end])
        model.backward((end - start) / 40 * dlogits)
        exchange(1)
        return model.gradients

    def work(ranks: Communicator) -> np.ndarray:
        model = nn.MLP((3, 5, 4, 2), **options, communicator=ranks)
        return step(model, *SHARDS[ranks.rank], GradientExchange(ranks, [model.gradients]))

    right = step(nn.MLP((3, 5, 4, 2), **options), 0, 40, lambda weight: None)
    for found in run_threads(2, work):
        np.testing.assert_allclose(found, right, rtol=1e-10, atol=1e-13)


def test_gradients_of_weights_above_are_formed_while_the_ranks_exchange_sums() -> None:
    class Observed(OneRank):
        unwritten: ClassVar[list[bool]] = []

        def start(self, values: Any) -> Any:
            """Note whether the gradients of the layer above are still to come."""
            self.unwritten.append(bool(np.isnan(model.gradients).any()))
            return super().start(values)

    model = nn.MLP((3, 5, 4, 2), communicator=Observed())
    y = model.forward(np.ones((6, 3), "float32") * np.arange(6, dtype="float32")[:, None])
    Observed.unwritten.clear()
    above = [layer.gradients["weight"] for layer in model.layers[2::2]]
    for gradient in above:
        gradient[...] = np.nan
    model.backward(np.ones_like(y))
    assert Observed.unwritten == [True, True]
    assert not any(np.isnan(gradient).any() for gradient in above)


def test_an_exchange_of_other_sizes_is_an_error_on_all_ranks() -> None:
    def work(ranks: Communicator) -> None:
        with pytest.raises(RankError, match=r"a flat exchange of \[3\] numbers.*a flat exchange of \[4\] numbers"):
            GradientExchange(ranks, [np.ones(3 + ranks.rank)])

    run_threads(2, work, timeout=20)


def test_an_exchange_carries_the_largest_flag() -> None:
    def work(ranks: Communicator) -> float:
        return GradientExchange(ranks, [np.ones(2), np.ones(3)])(flag=[0, 15, 2][ranks.rank])

    assert run_threads(3, work) == [15, 15, 15]
