"""Argument structs of the kernels: the records that ops pack for them, and which kernel takes which."""

from __future__ import annotations

import re
from importlib import import_module
from pkgutil import walk_packages

import numpy as np

from bnkernels import ops
from bnkernels.runtime import source


def _layouts() -> dict[str, dict[np.dtype, np.dtype]]:
    """Return the ``ARGUMENTS`` of every op by the struct: BatchNormForward is "forward" of batch_norm."""
    found = {}
    for module in walk_packages(ops.__path__, f"{ops.__name__}."):
        arguments = getattr(import_module(module.name), "ARGUMENTS", {})
        op = module.name.split(".")[2]
        for key, layout in arguments.items():
            several = isinstance(key, str)
            words = f"{op}_{key}" if several else op
            found[words.title().replace("_", "")] = layout if several else arguments
    return found


LAYOUTS = _layouts()


def struct_of(stem: str, kernel: str) -> str:
    """Return the struct that a kernel of ``cuda/<stem>.cu`` takes, by the line or macro that makes the kernel."""
    text = (source.folder() / f"{stem}.cu").read_text(encoding="utf-8")
    made = re.findall(r"BNK_KERNEL\w*\((bnk_[\w#]+), \((\w+)<", text)
    (struct,) = {struct for name, struct in made if re.fullmatch(re.sub(r"##\w+?(##|$)", r"\\w+", name), kernel)}
    return struct
