"""A network that PyTorch trained, taken over with its batch norms, and trained further without PyTorch.

`nn.from_torch` takes the module itself. Where there is only its checkpoint, here a safetensors file that PyTorch wrote,
`nn.load` reads it into layers that were made by hand: names and layout of the state are PyTorch's. It prints the
largest difference of the predictions, and the accuracy before and after more training.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import numpy as xp  # on a GPU: import cupy as xp
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from bnkernels import nn, softmax_cross_entropy

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()
images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32").reshape(-1, 8, 8)
rng = np.random.default_rng(0)

torch.manual_seed(0)
theirs = torch.nn.Sequential(
    *(torch.nn.Flatten(), torch.nn.Linear(64, 32, bias=False), torch.nn.BatchNorm1d(32), torch.nn.ReLU()),
    torch.nn.Linear(32, 10),
)
optimiser = torch.optim.Adam(theirs.parameters(), lr=0.01)
for _ in range(options.steps // 4):
    rows = rng.integers(0, 1400, 64)
    loss = torch.nn.functional.cross_entropy(theirs(torch.from_numpy(images[rows])), torch.from_numpy(labels[rows]))
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
with torch.no_grad():
    want = theirs.eval()(torch.from_numpy(images)).numpy()

images, labels, want = map(xp.asarray, (images, labels, want))
taken = nn.from_torch(theirs, xp=xp)
hidden = nn.Linear(64, 32, bias=False), nn.BatchNorm(32), nn.ReLU()
model = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, 10)).to(xp)
with tempfile.TemporaryDirectory() as folder:
    save_file(theirs.state_dict(), Path(folder) / "theirs.safetensors")
    model.load_state_dict(nn.load(Path(folder) / "theirs.safetensors"))
difference = max(float(abs(one.eval()(images) - want).max()) for one in (taken, model))
others = int((model(images).argmax(1) != want.argmax(1)).sum())
print(f"largest difference of logits {difference:.1e}, other classes {others}")


def accuracy():
    """Return the share of right answers for the images of other writers."""
    return float((model.forward(images[1400:], training=False).argmax(1) == labels[1400:]).mean())


before = accuracy()
adam = nn.Adam(model.train(), lr=0.01)
for _ in range(options.steps):
    rows = xp.asarray(rng.integers(0, 1400, 64))
    _, dlogits = softmax_cross_entropy(model(images[rows]), labels[rows])
    model.backward(dlogits)
    adam.step()
print(f"accuracy {before:.3f}, after more training {accuracy():.3f}")
theirs.load_state_dict({name: torch.from_numpy(array) for name, array in model.state_dict().items()})  # the way back
