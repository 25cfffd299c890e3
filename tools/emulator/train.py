"""The trainer with its networks on the emulator: what a GPU would do, but for its speed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from bnkernels import cli
from bnkernels.runtime.registry import Device
from bnkernels.train import trainer


@contextmanager
def emulated_device() -> Iterator[None]:
    """Let the trainer take the emulator for its device, whatever the option says."""
    from tools import backends  # which imports this package

    xp = backends.make("emulator").xp
    xp.cuda = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(synchronize=lambda: None))
    before: Any = trainer.choose_device
    trainer.choose_device = lambda option: Device(xp, "the emulator", emulated=True)
    try:
        yield
    finally:
        trainer.choose_device = before


def train(arguments: Sequence[str]) -> int:
    """Run ``bnkernels train`` with these arguments on the emulator; return its exit status."""
    with emulated_device():
        return cli.main(["train", *arguments])
