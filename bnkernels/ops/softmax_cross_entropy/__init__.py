"""Softmax cross-entropy and its gradient."""
