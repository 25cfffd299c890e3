"""Ops: arrays in, arrays out. Each checks its arguments, plans the launch, and launches."""
