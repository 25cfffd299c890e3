"""A linear layer with its normalisation and activation."""
