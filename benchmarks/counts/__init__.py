"""Counts that need no GPU: launches, bytes, registers, predicted limits."""
