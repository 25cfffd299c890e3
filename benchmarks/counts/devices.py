"""GPUs that kernels are planned for, from NVIDIA's tables and data sheets; no GPU is asked.

Limits of an architecture are those of the CUDA C++ programming guide, table "Technical Specifications per Compute
Capability", compared with ``cuda/__device/arch_traits.h`` of the CUDA Core Compute Libraries and ``cuda_occupancy.h``,
CUDA 13. Multiprocessors are those of the product pages, architecture papers and the guide to MIG.
"""

from __future__ import annotations

from dataclasses import dataclass

from bnkernels.runtime.seam import Limits


@dataclass(frozen=True)
class Architecture:
    """Resources of an SM of a compute capability.

    Attributes
    ----------
    name : str
        As NVRTC takes it, without ``sm_``.
    warps, blocks : int
        The most that are resident.
    shared_bytes : int
        Shared memory; a block gets all of it but the reserved part, where it asks for it (opt-in beyond 48 KiB).
    reserved_bytes, shared_unit : int
        Shared memory that every block costs beside its own, and in what units it is given out.
    """

    name: str
    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int = 1024
    shared_unit: int = 128


@dataclass(frozen=True)
class Device:
    """A GPU, from NVIDIA's data sheets and architecture papers; what has no published figure is None.

    Attributes
    ----------
    sms : int
        Number of SMs.
    dram : float or None
        Bytes per second (data sheet). Copies reach less; for the H200 4.3e12 have been published.
    l2_bytes : int or None
        Size of the L2 cache (architecture paper; for the H200 what the device reports).
    clock : float or None
        Boost clock in Hz: the highest, so that nothing is faster than predicted.
    launch_floor : float or None
        Seconds of a kernel with next to nothing to do, as a node of a CUDA graph (published).
    l2_latency, shared_latency : int or None
        Clocks of one dependent access (published).
    """

    name: str
    architecture: Architecture
    sms: int
    dram: float | None = None
    l2_bytes: int | None = None
    clock: float | None = None
    launch_floor: float | None = None
    l2_latency: int | None = None
    shared_latency: int | None = None

    @property
    def choice(self) -> Limits:
        """Limits that the choice of a launch asks for; without clusters, which are not counted."""
        of = self.architecture
        most = of.shared_bytes - of.reserved_bytes
        held = 32 * of.warps, of.blocks, of.reserved_bytes
        return Limits(self.sms, most, of.shared_bytes, True, False, *held, int(of.name) >= 80)


KIB, MIB = 1024, 1024**2
SM_75 = Architecture("75", 32, 16, 64 * KIB, reserved_bytes=0, shared_unit=256)
SM_80 = Architecture("80", 64, 32, 164 * KIB)
SM_86 = Architecture("86", 48, 16, 100 * KIB)
SM_87 = Architecture("87", 48, 16, 164 * KIB)
SM_89 = Architecture("89", 48, 24, 100 * KIB)
SM_90 = Architecture("90", 64, 32, 228 * KIB)
SM_100 = Architecture("100", 64, 32, 228 * KIB)
SM_110 = Architecture("110", 48, 24, 228 * KIB)
SM_120 = Architecture("120", 48, 24, 100 * KIB)
SM_121 = Architecture("121", 48, 24, 100 * KIB)

# Launch floor of Hopper: 1.1 to 1.3 us a node (pytorch/pytorch issue 161104; flagos-ai/FlagGems issue 5727, on an H20).
# Latencies of Hopper: on an H800, arXiv:2402.13499.
HOPPER = {"clock": 1.98e9, "launch_floor": 1.1e-6, "l2_latency": 263, "shared_latency": 29}
A100 = Device("A100 SXM 80 GB", SM_80, 108, 2.039e12, 40 * MIB)
H100 = Device("H100 SXM", SM_90, 132, 3.35e12, 50 * MIB, **HOPPER)
H200 = Device("H200 SXM", SM_90, 132, 4.8e12, 60 * MIB, **HOPPER)
B200 = Device("B200", SM_100, 148, 8.0e12, 126 * MIB)
RTX_5090 = Device("RTX 5090", SM_120, 170, 1.792e12, 96 * MIB)
DEVICES = (  # a slice of a device under MIG is a device
    Device("T4", SM_75, 40),
    A100,
    Device("A30", SM_80, 56),
    Device("A100, slice 1g", SM_80, 14),
    Device("RTX 3060", SM_86, 28),
    Device("RTX 3090", SM_86, 82),
    Device("A10", SM_86, 72),
    Device("Jetson AGX Orin", SM_87, 16),
    Device("RTX 4060", SM_89, 24),
    Device("RTX 4090", SM_89, 128),
    Device("L4", SM_89, 58),
    Device("L40S", SM_89, 142),
    Device("H100 PCIe", SM_90, 114),
    H100,
    H200,
    Device("H100, slice 1g", SM_90, 16),
    Device("H100, slice 3g", SM_90, 60),
    B200,
    Device("Jetson Thor", SM_110, 20),
    Device("RTX 5060", SM_120, 30),
    Device("RTX 5070", SM_120, 48),
    RTX_5090,
    Device("RTX PRO 6000 Blackwell", SM_120, 188),
    Device("GB10", SM_121, 48),
)
