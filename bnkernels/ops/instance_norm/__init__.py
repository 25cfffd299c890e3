"""Instance normalisation, by the kernels of batch norm."""
