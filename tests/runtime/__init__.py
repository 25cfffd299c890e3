"""Tests of what launches kernels."""
