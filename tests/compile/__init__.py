"""Compiles the kernels with NVRTC, which needs neither a driver nor a GPU: ``python -m tests.compile``.

Every kernel must compile for every architecture that NVRTC knows, without spilling, and within the registers of the
committed baseline.
"""
