"""The page's example of PyTorch runs as it stands there; without such an import nobody pays for PyTorch's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools import real_torch

torch = real_torch.load()

from bnkernels.compat import torch as ours  # noqa: E402

ROOT = Path(__file__).parents[2]


def test_the_example_of_the_page_runs() -> None:
    page = (ROOT / "docs" / "howto" / "pytorch.md").read_text(encoding="utf-8")
    example, taken_over = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict[str, Any] = {}
    exec(example, names)
    model, converted = names["model"], names["ours"]
    assert all(torch.isfinite(parameter.grad).all() for parameter in (*model.parameters(), *converted.parameters()))
    assert (type(converted[1]), type(converted[2])) == (ours.BatchNorm2d, ours.LayerNorm)
    assert names["images"].grad.abs().max() > 0
    names["torch_model"] = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
    exec(taken_over, names)
    assert len(list(names["layers"].state_dict())) == len(names["torch_model"].state_dict())


def test_importing_bnkernels_imports_no_pytorch() -> None:
    code = "import sys, bnkernels, bnkernels.nn, bnkernels.compat; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
