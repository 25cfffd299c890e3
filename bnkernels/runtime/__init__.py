"""Kernel launches: checks, arguments, devices; knows no op."""
