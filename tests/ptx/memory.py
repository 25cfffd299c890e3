"""Memory that instructions reach: arrays at their real addresses, shared memory, and the kernel's arguments."""

from __future__ import annotations

import bisect
import ctypes

import numpy as np


class AccessError(Exception):
    """An access outside of everything, or at a misaligned address."""


def _check_alignment(addresses: np.ndarray, size: int) -> None:
    wrong = addresses & (size - 1) != 0
    if wrong.any():
        raise AccessError(f"{size} bytes at the misaligned address {int(addresses[wrong][0]):#x}")


class GlobalMemory:
    """The arrays that kernels may touch; everything else raises `AccessError`."""

    def __init__(self) -> None:
        self._regions: dict[int, np.ndarray] = {}  # bytes by their first address
        self._starts: list[int] = []

    def allow(self, address: int, size: int) -> None:
        """Let kernels touch `size` bytes from `address` on, until `forbid`; they must stay allocated as long."""
        block = (ctypes.c_ubyte * size).from_address(address)
        self._regions[address] = np.frombuffer(block, np.uint8)
        self._starts = sorted(self._regions)

    def forbid(self, address: int) -> None:
        """Take back `allow`."""
        del self._regions[address]
        self._starts = sorted(self._regions)

    def holds(self, address: int) -> bool:
        """Tell whether kernels may touch the byte at `address`."""
        start = self._start_below(address)
        return start is not None and address < start + self._regions[start].size

    def _start_below(self, address: int) -> int | None:
        at = bisect.bisect_right(self._starts, address)
        return self._starts[at - 1] if at else None

    def _parts(self, addresses: np.ndarray, size: int) -> list[tuple[np.ndarray | slice, np.ndarray, int]]:
        """Return which of the accesses are in the same region, its bytes, and its first address, for all regions."""
        _check_alignment(addresses, size)
        parts, left = [], np.arange(addresses.size)
        while left.size:
            here = addresses[left]
            first = int(here[0])
            start = self._start_below(first)
            block = None if start is None else self._regions[start]
            if block is None or first + size > start + block.size:
                raise AccessError(f"{size} bytes at {first:#x}, which is outside of all arrays")
            inside = (here >= start) & (here <= start + block.size - size)
            if inside.all():
                parts.append((slice(None) if left.size == addresses.size else left, block, start))
                break
            parts.append((left[inside], block, start))
            left = left[~inside]
        return parts

    def load(self, addresses: np.ndarray, kind: np.dtype, count: int, mask: np.ndarray | bool) -> np.ndarray:
        """Return `count` numbers from each address, of shape (addresses, count)."""
        size = kind.itemsize * count
        values = np.empty((addresses.size, count), kind)
        for which, block, start in self._parts(addresses, size):
            numbers, first = _typed(block, start, kind)
            index = (addresses[which] - first) // kind.itemsize
            for i in range(count):
                values[which, i] = numbers[index + i]
        return values

    def store(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray | bool) -> None:
        """Write `values` of shape (addresses, count)."""
        count, kind = values.shape[1], values.dtype
        for which, block, start in self._parts(addresses, kind.itemsize * count):
            numbers, first = _typed(block, start, kind)
            index = (addresses[which] - first) // kind.itemsize
            for i in range(count):
                numbers[index + i] = values[which, i]


def _typed(block: np.ndarray, start: int, kind: np.dtype) -> tuple[np.ndarray, int]:
    """Return a block as numbers at aligned addresses, and the address of the first."""
    skipped = -start % kind.itemsize
    whole = (block.size - skipped) // kind.itemsize * kind.itemsize
    return block[skipped : skipped + whole].view(kind), start + skipped


class BlockMemory:
    """So many bytes for each block of threads, whose addresses begin at 0: shared memory, or arguments that all see.

    Parameters
    ----------
    content : array of uint8, shape (blocks, size), size a multiple of 16
        The bytes; changed in place.
    size : int
        How many of them there are for the kernel.
    blocks : array of int64, shape (lanes,)
        The block of every lane.
    """

    def __init__(self, content: np.ndarray, size: int, blocks: np.ndarray) -> None:
        self._content, self._size = content.reshape(-1), size
        self._bases = blocks * content.shape[1]

    def _index(self, addresses: np.ndarray, kind: np.dtype, count: int, mask: np.ndarray | bool) -> np.ndarray:
        size = kind.itemsize * count
        wrong = (addresses < 0) | (addresses > self._size - size)
        if wrong.any():
            raise AccessError(f"{size} bytes at {int(addresses[wrong][0])} of {self._size} bytes")
        _check_alignment(addresses, size)
        return (addresses + (self._bases if mask is True else self._bases[mask])) // kind.itemsize

    def load(self, addresses: np.ndarray, kind: np.dtype, count: int, mask: np.ndarray | bool) -> np.ndarray:
        """Return `count` numbers from each address, of shape (addresses, count)."""
        index = self._index(addresses, kind, count, mask)
        numbers = self._content.view(kind)
        return numbers[index[:, None] + np.arange(count)]

    def store(self, addresses: np.ndarray, values: np.ndarray, mask: np.ndarray | bool) -> None:
        """Write `values` of shape (addresses, count)."""
        count, kind = values.shape[1], values.dtype
        index = self._index(addresses, kind, count, mask)
        self._content.view(kind)[index[:, None] + np.arange(count)] = values
