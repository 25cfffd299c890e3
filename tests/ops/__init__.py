"""Tests of the ops, on every backend."""
