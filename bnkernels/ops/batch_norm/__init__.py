"""Batch normalisation: training, inference, in parts, double backward, folding."""
