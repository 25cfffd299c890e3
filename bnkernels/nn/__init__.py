"""Layers, networks and optimisers: they own arrays and call the ops."""
