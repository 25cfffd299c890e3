"""Limits of the hardware: occupancy of an SM, and a lower bound of the time of a launch.

Pure functions of published figures; nothing here was measured by this project, and no GPU is asked. A time from here is
predicted, not measured.

The devices are those of ``benchmarks/counts/devices.py``; the rules of allocation are those of NVIDIA's
``cuda_occupancy.h``, CUDA 13.0:

* a warp gets its registers in units of 256, from one of four partitions of 16384;
* a block gets its shared memory in units of 128 bytes, and 1 KiB of it belongs to the system; of sm_75 in units of 256
  bytes, and all of it.

`SM_BYTES_PER_CLOCK` is what the load/store path of an SM carries, 32 lanes of 4 bytes per clock: published for shared
memory, which is one unit with the L1 cache, in QuACK's notes on micro-benchmarks of the H100. Every byte that a thread
asks for takes that way, also from a cache. What an SM draws from L2 is less; no figure for one SM was found.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.counts.devices import Architecture, Device

WARP = 32
REGISTERS = 65536  # 32-bit registers per SM; also the most that one block gets
PARTITIONS = 4
REGISTER_UNIT = 256
MAX_REGISTERS = 255  # per thread
MAX_THREADS = 1024  # per block
SM_BYTES_PER_CLOCK = 128


class Occupancy(NamedTuple):
    """Resident blocks and warps of an SM, the share of its warps, and the resource that bounds them."""

    blocks: int
    warps: int
    share: float
    bound: str


def occupancy(architecture: Architecture, threads: int, registers: int, shared_bytes: int) -> Occupancy:
    """Return how much of a kernel fits on an SM.

    Parameters
    ----------
    architecture : Architecture
        Compute capability.
    threads : int
        Threads of a block.
    registers : int
        Registers of a thread, as the compiler reports them.
    shared_bytes : int
        Shared memory of a block, static and dynamic.

    Returns
    -------
    Occupancy
        With no block where one block alone is too large.

    Raises
    ------
    ValueError
        For what no kernel has.

    Examples
    --------
    >>> from benchmarks.counts.devices import SM_90
    >>> occupancy(SM_90, threads=512, registers=38, shared_bytes=6144)
    Occupancy(blocks=3, warps=48, share=0.75, bound='registers')
    """
    if not (1 <= threads <= MAX_THREADS and 0 <= registers <= MAX_REGISTERS and shared_bytes >= 0):
        raise ValueError(
            f"expected 1 to {MAX_THREADS} threads, 0 to {MAX_REGISTERS} registers and shared_bytes >= 0, "
            f"got {threads}, {registers}, {shared_bytes}"
        )
    warps = -(-threads // WARP)
    by = {"blocks": architecture.blocks, "warps": architecture.warps // warps}
    if registers:
        of_warp = _round_up(registers * WARP, REGISTER_UNIT)
        by["registers"] = REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps
    shared = _round_up(shared_bytes + architecture.reserved_bytes, architecture.shared_unit)
    by["shared memory"] = architecture.shared_bytes // shared if shared else architecture.blocks
    bound = min(by, key=lambda name: by[name])
    return Occupancy(by[bound], by[bound] * warps, by[bound] * warps / architecture.warps, bound)


def waves(device: Device, blocks: int, resident: int) -> float:
    """Return how often the device is filled by a grid of `blocks`, of which an SM holds `resident`; below 1: once."""
    return blocks / (resident * device.sms)


def busy_sms(device: Device, blocks: int) -> int:
    """Return the most SMs to which a grid of `blocks` gives work."""
    return min(blocks, device.sms)


class Work(NamedTuple):
    """Counts of one launch: blocks, bytes (each counted once; and by every access), barriers of a block."""

    blocks: int
    unique_bytes: int
    accessed_bytes: int
    barriers: int


class Prediction(NamedTuple):
    """A time in seconds that cannot be undercut, and what binds it."""

    seconds: float
    bound: str


def predict(device: Device, work: Work, *, cold: bool) -> Prediction | None:
    """Return a lower bound of a launch's time among many in a CUDA graph: predicted, not measured.

    Parameters
    ----------
    device : Device
        GPU on which it would run.
    work : Work
        Counts of the launch.
    cold : bool
        Whether the arrays come from DRAM and go there, as with buffers that take turns; else they may lie in the L2
        cache, if they fit.

    Returns
    -------
    Prediction or None
        None where the device has no published launch floor: for small kernels nothing else counts.

    Notes
    -----
    The greatest of

    * ``launch``: the launch floor;
    * ``DRAM``: ``unique_bytes / dram``, left out if not `cold` and ``unique_bytes <= l2_bytes``. Reading twice is free
      here: the second time may come from a cache;
    * ``SMs``: ``accessed_bytes / (SMs with work * 128 bytes * clock)``. A small grid cannot draw the bandwidth of the
      whole device;
    * ``latency``: one access to L2 (nothing can be computed before), and for every barrier one to shared memory (what
      was written before it is read behind it).

    A real kernel does not overlap all of that, has instructions to issue, and keeps too few loads in flight: expect to
    measure more. To measure less would mean that the figures above are wrong.
    """
    if device.launch_floor is None:
        return None
    clocks = device.l2_latency + work.barriers * device.shared_latency
    limits = {
        "launch": device.launch_floor,
        "DRAM": work.unique_bytes / device.dram,
        "SMs": work.accessed_bytes / (busy_sms(device, work.blocks) * SM_BYTES_PER_CLOCK * device.clock),
        "latency": clocks / device.clock,
    }
    if not cold and work.unique_bytes <= device.l2_bytes:
        del limits["DRAM"]
    bound = max(limits, key=lambda name: limits[name])
    return Prediction(limits[bound], bound)


def best_possible(device: Device, fewest_bytes: int) -> float | None:
    """Return the seconds that no kernel whatever undercuts, cold: its launch, and the fewest bytes through DRAM."""
    if device.launch_floor is None:
        return None
    return max(device.launch_floor, fewest_bytes / device.dram)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
