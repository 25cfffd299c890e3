"""Synchronised batch norm of PyTorch's ops with the collectives of its ``SyncBatchNorm``, over gloo.

``torch.nn.SyncBatchNorm`` itself refuses CPU tensors. This composite makes the same two collectives, an all-gather of
mean, reciprocal deviation and count and an all-reduce of two sums, without the cost of autograd.
"""

from __future__ import annotations

import os
import socket
from types import ModuleType
from typing import Any

EPS, MOMENTUM = 1e-5, 0.1


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class SyncBatchNorm:
    """Forward and backward of a layer on this rank's part of the mini-batch.

    Attributes
    ----------
    sent : list of int
        Bytes that this rank has brought to each collective.
    """

    def __init__(self, torch: ModuleType, channels: int) -> None:
        self.torch, self.dist = torch, torch.distributed
        self.weight, self.bias = torch.ones(channels), torch.zeros(channels)
        self.running_mean, self.running_var = torch.zeros(channels), torch.ones(channels)
        self.sent: list[int] = []
        # The former is the new name of the latter.
        self._all_gather = getattr(self.dist, "all_gather_single", None) or self.dist.all_gather_into_tensor

    def forward(self, x: Any) -> Any:
        """Return the output; keep what the backward needs."""
        torch, channels = self.torch, x.shape[1]
        var, mean = torch.var_mean(x, dim=0, correction=0)
        mine = torch.cat([mean, torch.rsqrt(var + EPS), torch.full((1,), float(len(x)))])
        every = mine.new_empty(self.dist.get_world_size() * len(mine))
        self.sent.append(mine.nbytes)
        self._all_gather(every, mine)
        every = every.view(-1, len(mine))
        means, rstds, counts = every[:, :channels], every[:, channels:-1], every[:, -1:]
        total = counts.sum()
        self.mean = (counts * means).sum(0) / total
        var = (counts * (rstds**-2 - EPS + (means - self.mean) ** 2)).sum(0) / total
        self.rstd, self.total = torch.rsqrt(var + EPS), total
        self.running_mean.lerp_(self.mean, MOMENTUM)
        self.running_var.lerp_(var * (total / (total - 1)), MOMENTUM)
        scale = self.weight * self.rstd
        return torch.addcmul(self.bias - self.mean * scale, x, scale)

    def backward(self, dy: Any, x: Any) -> tuple[Any, Any, Any]:
        """Return the gradients of input, weight and bias."""
        torch, channels = self.torch, x.shape[1]
        centred = x - self.mean
        sum_dy, sum_dy_centred = dy.sum(0), (dy * centred).sum(0)
        both = torch.cat([sum_dy, sum_dy_centred])
        self.sent.append(both.nbytes)
        self.dist.all_reduce(both)
        mean_dy, mean_product = both[:channels] / self.total, both[channels:] / self.total
        scale = self.weight * self.rstd
        dx = torch.addcmul(dy - mean_dy, centred, self.rstd**2 * mean_product, value=-1).mul_(scale)
        return dx, sum_dy_centred * self.rstd, sum_dy


def start(rank: int, size: int, port: int) -> ModuleType:
    """Return PyTorch, whose ranks have met."""
    import torch

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    return torch
