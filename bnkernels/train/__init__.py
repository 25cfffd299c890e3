"""Training from the command line: configuration, data, engines, runs, checkpoints, plots."""
