"""Whole training steps in one launch."""
