"""Tools that tests and benchmarks share: the emulator, the compilers, the stand-in for CuPy, the oracles."""
