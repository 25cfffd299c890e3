"""Parts that all benchmarks share: cases, places, clocks, the protocol, records."""
