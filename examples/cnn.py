"""A small convolutional network with batch norm of NCHW images, on scikit-learn's digits or the files of MNIST.

bnkernels has no convolution. The one below is a linear layer of 3 x 3 patches (im2col), cut out and put back by
indexing: short, and slow beside cuDNN. With `--data FOLDER` it reads the four .gz files of MNIST or
Fashion-MNIST. It prints the accuracy on images that it was not trained on.
"""

import argparse
from pathlib import Path

import numpy as np
import numpy as xp  # on a GPU: import cupy as xp

from bnkernels import nn, softmax_cross_entropy
from bnkernels.train.data_files import read_mnist


class Convolution(nn.Layer):
    """Convolution of 3 x 3, whose stride of 2 halves the image."""

    def __init__(self, inputs, outputs, stride, seed):
        super().__init__()
        self.linear, self.stride = nn.Linear(inputs * 9, outputs, bias=False, seed=seed, xp=xp), stride

    @property
    def children(self):
        """The layers inside, whose parameters are this one's."""
        return {"linear": self.linear}

    def forward(self, x, *, training=None):
        """Return (N, outputs, H / stride, W / stride)."""
        n, channels, height, width = x.shape
        self.padded = xp.zeros((n, channels, height + 2, width + 2), x.dtype)
        self.padded[:, :, 1:-1, 1:-1] = x
        patches = xp.stack([self.padded[place] for place in self.places(height, width)]).transpose(1, 3, 4, 2, 0)
        y = self.linear.forward(patches.reshape(*patches.shape[:3], channels * 9), training=training)
        return y.transpose(0, 3, 1, 2)

    def backward(self, dy, *, accumulate=False):
        """Return the gradient of the input: every patch added where it was cut out."""
        dpatches = self.linear.backward(dy.transpose(0, 2, 3, 1), accumulate=accumulate)
        dpatches = dpatches.reshape(*dpatches.shape[:3], -1, 9).transpose(4, 0, 3, 1, 2)
        dpadded, (height, width) = xp.zeros_like(self.padded), self.padded.shape[2:]
        for place, dpatch in zip(self.places(height - 2, width - 2), dpatches, strict=True):
            dpadded[place] += dpatch
        return dpadded[:, :, 1:-1, 1:-1]

    def places(self, height, width):
        """Return where the nine pixels of all patches are."""
        return [
            np.s_[:, :, i : i + height : self.stride, j : j + width : self.stride] for i in range(3) for j in range(3)
        ]


def data(folder):
    """Return images (N, 1, H, W) between 0 and 1 and labels, to train on and to test."""
    if folder:
        images, labels, test_images, test_labels = read_mnist(folder, "float32")
        pixels = images / np.float32(255), test_images / np.float32(255)
        return pixels[0][:, None], labels.astype("int64"), pixels[1][:, None], test_labels.astype("int64")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 1, 8, 8)
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, help="folder of MNIST's or Fashion-MNIST's files")
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()
images, labels, test_images, test_labels = (xp.asarray(array) for array in data(options.data))

model = nn.Sequential(
    *(Convolution(1, 16, stride=1, seed=1), nn.BatchNorm(16, activation="relu", xp=xp)),
    *(Convolution(16, 32, stride=2, seed=2), nn.BatchNorm(32, activation="relu", xp=xp)),
    nn.Flatten(),
    nn.Linear(32 * (images.shape[2] // 2) * (images.shape[3] // 2), 10, seed=3, xp=xp),
)
optimiser = nn.Adam(model, lr=0.003)
rng = np.random.default_rng(0)
for _ in range(options.steps):
    rows = xp.asarray(rng.integers(0, len(images), 64))
    losses, dlogits = softmax_cross_entropy(model(images[rows]), labels[rows])
    model.backward(dlogits)
    optimiser.step()
model.eval()
parts = zip(xp.array_split(test_images, 50), xp.array_split(test_labels, 50), strict=True)
right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in parts)
print(f"loss {float(losses.mean()):.4f}, accuracy {right / len(test_images):.3f} on {len(test_images)} other images")
