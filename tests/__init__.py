"""Tests, in the same wings as what they test."""
