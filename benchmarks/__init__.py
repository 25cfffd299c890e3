"""Benchmarks, each library with one thread: their thread pools read these variables when they are first imported."""

import os

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
