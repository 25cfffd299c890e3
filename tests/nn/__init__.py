"""Tests of layers and networks."""
