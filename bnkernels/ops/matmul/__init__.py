"""A matrix product that a CUDA graph can capture."""
