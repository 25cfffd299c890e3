"""One optimiser step over all parameters of a network at once."""
