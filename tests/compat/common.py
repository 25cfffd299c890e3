"""Helpers of the tests of norms in PyTorch's place: numbers that are compared as their type allows."""

from __future__ import annotations

from typing import Any

from tools import real_torch

torch = real_torch.load()


def assert_equal(found: Any, wanted: Any, rounding: Any = None) -> None:
    """Compare tensors: their types, and their numbers to units in the last place of the largest; or Nones.

    Ours and PyTorch's lie within 8 units, of their type or of another that PyTorch rounds to on the way.
    """
    if wanted is None:
        assert found is None
        return
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    if wanted.numel() and wanted.is_floating_point():
        assert torch.isfinite(wanted).all()
        unit = torch.finfo(rounding or wanted.dtype).eps * max(1.0, wanted.abs().max().item())
        assert (found.double() - wanted.double()).abs().max() <= 16 * unit
    else:
        assert torch.equal(found, wanted)
