"""Compiles the kernels with NVRTC, which needs neither a driver nor a GPU: ``python -m tools.compile``.

Every kernel must compile with every compiler of ``compilers.txt``, for all architectures that it knows, without
spilling, and with the registers of the committed baseline; by the newest, also with its numbers of instructions.
"""
