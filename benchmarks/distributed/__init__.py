"""Benchmarks of ranks: synchronised batch norm beside PyTorch's collectives, and a model of many ranks."""
