"""Packaging of bnkernels. All metadata is here; pyproject.toml holds the configuration of the tools."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

TRAIN = ["scikit-learn>=1.5", "threadpoolctl>=3.1", "tqdm>=4.66", "matplotlib>=3.8"]
NOTEBOOKS = [*TRAIN, "nbmake>=1.5", "ipykernel>=6.29"]
TEST = [
    *NOTEBOOKS,
    "pytest>=8",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.5",  # the suite on all processors
    "hypothesis>=6.100",
    "numpydoc>=1.8",
    "ruff>=0.12",
    "clang-format>=20",
    "ml_dtypes>=0.5",  # bfloat16 for NumPy
    "setuptools>=77",  # tests/test_packaging.py builds without the network
]
CUPY = ">=14.0,<15"
# Without a driver CuPy computes nothing, but can be imported: the tests' stand-in is compared with it.
WHEELS = (
    "(sys_platform == 'linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64') "
    "or sys_platform == 'win32' and platform_machine == 'AMD64') and python_version < '3.15'"
)


def version() -> str:
    """Read the version without importing the package, which would need NumPy."""
    text = (ROOT / "bnkernels" / "_version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


setup(
    name="bnkernels",
    version=version(),
    description="Custom CUDA batch-norm kernels for CuPy, with a NumPy twin on the CPU",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    author="the bnkernels authors",
    keywords=["CUDA", "CuPy", "batch normalization", "GPU kernels"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Environment :: GPU :: NVIDIA CUDA",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    # cuda/ lies at the top of the checkout but is installed inside the package: a top-level `cuda` is NVIDIA's.
    packages=[*find_packages(include=["bnkernels", "bnkernels.*"]), "bnkernels.cuda"],
    package_dir={"bnkernels.cuda": "cuda"},
    package_data={"bnkernels.cuda": ["*.cu", "lib/*.cuh", "lib/*/*.cuh"]},
    include_package_data=False,
    python_requires=">=3.10",
    install_requires=["numpy>=2,<2.6"],
    extras_require={
        "train": TRAIN,
        "cuda12": [f"cupy-cuda12x[ctk]{CUPY}"],
        "cuda13": [f"cupy-cuda13x[ctk]{CUPY}"],
        "without-gpu": [f"cupy-cuda13x{CUPY}; {WHEELS}"],  # never beside one of the two: they share their files
        "notebooks": NOTEBOOKS,
        "benchmarks": [*TRAIN, "torch>=2.5", "ml_dtypes>=0.5"],  # more rivals take part where they are installed
        "test": TEST,
    },
    entry_points={"console_scripts": ["bnkernels = bnkernels.cli:main"]},
)
