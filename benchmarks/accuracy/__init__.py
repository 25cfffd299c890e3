"""Errors against exact results."""
