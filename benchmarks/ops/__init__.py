"""Benchmarks of the ops: `bench_X` declares op X."""
