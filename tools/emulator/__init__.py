"""Runs the text of ``cuda/`` on the CPU, and judges and counts what it does; see docs/emulator.md."""

from __future__ import annotations

from .binding import Counts, Traffic
from .build import EmulatorError, compiler
from .runtime import LIMITS, EmulatedArray, EmulatorRuntime, LaunchRecord, from_environment

__all__ = [
    "LIMITS",
    "Counts",
    "EmulatedArray",
    "EmulatorError",
    "EmulatorRuntime",
    "LaunchRecord",
    "Traffic",
    "compiler",
    "from_environment",
]
