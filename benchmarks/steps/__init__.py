"""Training steps, ours and others', from the same initial weights: one module per framework.

Every module but `step` ends with its `MAKERS`; PyTorch and JAX are imported where they are used, so that everything
else works without them.
"""

from __future__ import annotations

from benchmarks.steps import expression, jax_xla, ours, pytorch
from benchmarks.steps.step import Maker

MAKERS = (*ours.MAKERS, *expression.MAKERS, *pytorch.MAKERS, *jax_xla.MAKERS)


def makers(place: str, only: tuple[str, ...] = ()) -> dict[str, Maker]:
    """Return the makers of steps at a place, by name.

    Parameters
    ----------
    place : str
        ``cpu`` or ``cuda``.
    only : tuple of str
        Their names; if empty, all but those that are left out by default.

    Returns
    -------
    dict of str to Maker
        Makers, ours first; each knows whether it is installed (`Maker.absent`).

    Raises
    ------
    ValueError
        If there is nobody of such a name.
    """
    found = {maker.name: maker for maker in MAKERS if maker.place == place}
    if unknown := set(only) - found.keys():
        raise ValueError(f"nobody at {place} is named {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    return {name: maker for name, maker in found.items() if (name in only if only else maker.default)}
