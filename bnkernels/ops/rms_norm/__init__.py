"""RMS normalisation over the last axes, by the kernels of layer norm."""
