"""Tests of ranks that exchange arrays: threads of this process, and processes under mpiexec."""
