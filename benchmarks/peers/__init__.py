"""Libraries to compare with: one module per framework, each imported only where it is installed."""

EPSILON = 1e-5
MOMENTUM = 0.1  # weight of the new value
