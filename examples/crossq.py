"""CrossQ's two critics with batch renormalisation and no target network, on a problem whose answer is known.

Only the critics are here, and no agent: they learn the values of a fixed policy from a fixed replay of random
transitions. The system is linear and the costs are quadratic, so the exact values are a quadratic form to compare with.
What makes CrossQ is kept: the pairs of now and of next are one mini-batch for the norms, a target is the lower of two
critics and passes no gradient, and the norms are renormalised after a warm-up. It prints how good the values are.
"""

import argparse

import numpy as np
import numpy as xp  # on a GPU: import cupy as xp

from bnkernels import nn

DISCOUNT, GAIN = 0.8, np.array([[-0.6, -1.0]])  # the policy's action is GAIN @ state
SYSTEM, INPUT = np.array([[0.9, 0.2], [-0.2, 0.7]]), np.array([[0.0], [0.2]])  # a damped spring, pushed


class Both(nn.Layer):
    """Linear layers of both critics: their inputs are (2, N, inputs)."""

    def __init__(self, inputs, outputs, seed, activation="identity"):
        super().__init__()
        self.layers = [nn.Linear(inputs, outputs, activation=activation, seed=seed + i, xp=xp) for i in range(2)]

    @property
    def children(self):
        """The layers inside, whose parameters are this one's."""
        return {"first": self.layers[0], "second": self.layers[1]}

    def forward(self, x, *, training=None):
        """Return (2, N, outputs)."""
        return xp.stack([layer.forward(part, training=training) for layer, part in zip(self.layers, x, strict=True)])

    def backward(self, dy, *, accumulate=False):
        """Return the gradient of the input."""
        return xp.stack(
            [layer.backward(part, accumulate=accumulate) for layer, part in zip(self.layers, dy, strict=True)]
        )


def replay(count):
    """Return pairs (state, action), rewards, and the next pairs of a random behaviour."""
    rng = np.random.default_rng(0)
    state, action = rng.uniform(-1, 1, (count, 2)), rng.uniform(-2, 2, (count, 1))
    following = state @ SYSTEM.T + action @ INPUT.T
    rewards = -(state**2).sum(1) - 0.1 * action[:, 0] ** 2
    pairs, nexts = np.hstack([state, action]), np.hstack([following, following @ GAIN.T])
    return pairs.astype("float32"), rewards.astype("float32"), nexts.astype("float32")


def exact(pairs):
    """Return the values of pairs: minus a quadratic form, the fixed point of the Bellman equation."""
    step = np.vstack([np.hstack([SYSTEM, INPUT]), GAIN @ np.hstack([SYSTEM, INPUT])])
    cost = form = np.diag([1.0, 1.0, 0.1])
    for _ in range(500):
        form = cost + DISCOUNT * step.T @ form @ step
    return -np.einsum("ni,ij,nj->n", pairs, form, pairs)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=1500)
options = parser.parse_args()
pairs, rewards, nexts = map(xp.asarray, replay(5000))
# Scale and shift of a norm are in the linear layer behind it. One launch normalises for both critics.
norms = [nn.BatchNorm(size, groups=2, affine=False, momentum=0.01, eps=1e-3, renorm=(1.0, 0.0)) for size in (3, 64, 64)]
model = nn.Sequential(
    *(norms[0], Both(3, 64, 1, "relu"), norms[1], Both(64, 64, 3, "relu"), norms[2], Both(64, 1, 5)),
).to(xp)
optimiser, rng = nn.Adam(model, lr=0.004), np.random.default_rng(1)
for step in range(options.steps):
    if step == options.steps // 10:  # the running statistics are of some use now
        for norm in norms:
            norm.renorm = (3.0, 5.0)
    rows = xp.asarray(rng.integers(0, len(pairs), 256))
    together = xp.concatenate([pairs[rows], nexts[rows]])
    values = model(xp.stack([together, together]))[..., 0]
    targets = rewards[rows] + DISCOUNT * values[:, 256:].min(0)
    errors = values[:, :256] - targets
    dvalues = xp.zeros_like(values)
    dvalues[:, :256] = errors / 256
    model.backward(dvalues[..., None])
    optimiser.step()
found, truth = model.eval()(xp.stack([pairs, pairs]))[..., 0].min(0), xp.asarray(exact(replay(5000)[0]))
explained = 1 - float((found - truth).var() / truth.var())
print(f"variance of the values explained {explained:.3f}, mean error {float((found - truth).mean()):.2f}")
