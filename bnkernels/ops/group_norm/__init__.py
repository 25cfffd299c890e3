"""Group normalisation, by the kernels of layer norm."""
