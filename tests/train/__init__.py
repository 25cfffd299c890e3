"""Tests of the trainer and the command line."""
