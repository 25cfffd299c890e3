"""Makes .venv and installs bnkernels into it, editable, with the extras named: ``python3 tools/install.py train``.

CuPy comes along where an NVIDIA driver answers, in the flavour of the CUDA version it knows; where none does, only for
the tests, and without CUDA's libraries. Standard library only, and no syntax newer than Python 3.6, so that an old
interpreter gets the message below and not a syntax error.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (3, 10)
ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
COMPILERS = ROOT / "tools" / "compile" / "compilers.txt"


def driver_version(load=ctypes.CDLL):
    """Return the CUDA version of the NVIDIA driver, 1000 major + 10 minor; None where none answers with a GPU."""
    try:
        driver = load("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    # cuInit is what fails where the library is there but no GPU: in containers, and with NVIDIA's stub.
    if driver.cuInit(0) != 0 or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value


def cuda_extra(version):
    """Return the extra that brings CuPy for a driver of this CUDA version, or None: the CPU is enough."""
    if version is None:
        return None
    major = version // 1000
    return "cuda13" if major >= 13 else "cuda12" if major == 12 else None


def run(command, failure):
    """Run a command; where it fails, stop with a message that says what to do."""
    if subprocess.call([str(part) for part in command]) != 0:
        raise SystemExit("error: " + failure)


def make_venv(venv):
    """Make `venv` unless a working one is there; leave no half-made one behind. Return its Python."""
    python = venv / "bin" / "python"
    probe = [str(python), "-c", f"import pip, sys; sys.exit(sys.version_info < {OLDEST})"]
    if python.exists() and subprocess.call(probe, stderr=subprocess.DEVNULL) == 0:
        return python
    try:
        run(
            [sys.executable, "-m", "venv", "--clear", venv],
            f"python3 could not make {venv}; it needs the modules venv and ensurepip "
            "(on Debian and Ubuntu: apt-get install python3-venv)",
        )
    except BaseException:
        shutil.rmtree(str(venv), ignore_errors=True)
        raise
    return python


def install_compilers(pip):
    """Install each NVRTC of `COMPILERS` into a folder of its own, since an environment can have only one of a name."""
    shutil.rmtree(str(VENV / "nvrtc"), ignore_errors=True)
    for line in COMPILERS.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        folder = VENV / "nvrtc" / line.partition(";")[0].rpartition("==")[2]
        run([*pip, "--no-deps", "--target", folder, line], f"pip could not install {line}, see above; run make again")


def main(extras):
    """Install bnkernels with `extras`."""
    if sys.version_info < OLDEST:
        raise SystemExit(
            "error: bnkernels needs Python {}.{} or newer, and {} is {}.{}; name another one: "
            "make PYTHON=/path/to/python3".format(*OLDEST, sys.executable, *sys.version_info[:2])
        )
    version = driver_version()
    cuda = cuda_extra(version)
    if version is None:
        print("no NVIDIA driver with a GPU answers: installing for the CPU")
    elif cuda is None:
        print(f"the NVIDIA driver knows CUDA {version // 1000} and CuPy needs 12: installing for the CPU")
    else:
        print(f"the NVIDIA driver knows CUDA {version // 1000}: installing CuPy for it")
    python = make_venv(VENV)
    wanted = ",".join([*extras, *([cuda] if cuda else ["without-gpu"] if "test" in extras else [])])
    os.chdir(str(ROOT))
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(
        [*pip, "--editable", ".[" + wanted + "]"],
        f"pip could not install bnkernels[{wanted}], see above; run make again once that is solved "
        "(a later call repeats the installation)",
    )
    if "test" in extras:
        install_compilers(pip)


if __name__ == "__main__":
    main(sys.argv[1:])
