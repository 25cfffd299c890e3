"""The tables that the command line prints of a run: a heading, a row for every epoch, and the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bnkernels.runtime import cpu
from bnkernels.train.run_config import LABELS
from bnkernels.train.runs import TrainingResult
from bnkernels.train.trainer import Trainer


def heading(trainer: Trainer) -> str:
    """Return a description of the run, and the head of its table."""
    config, data = trainer.config, trainer.dataset
    columns = "".join(f" | {LABELS[norm]:^28}" for norm in trainer.learners)
    units = " |   loss   accuracy    µs/step" * len(trainer.learners)
    return (
        f"{data.name}: {len(data.x_train)} training and {len(data.x_test)} test examples\n"
        f"{config.describe(trainer.sizes)}, {config.dtype}\n"
        f"{trainer.total_steps} steps of {config.batch_size} examples, {config.rule}, "
        f"seed {config.seed}{of_several(config.models)}\n"
        f"device {trainer.device}; {engines(trainer)}\n{arrays(trainer)}\n"
        f"{'':13}{columns}\n{'epoch':>5}{'step':>8}{units}"
    )


def arrays(trainer: Trainer) -> str:
    """Return what computes on a CPU, and the way to something faster; empty on a GPU."""
    if trainer.xp is not np:
        return ""
    reason = cpu.why_reference()
    return f"NumPy arrays: {cpu.engine()}{f', because {reason}' if reason else ''}\n"


def of_several(models: int) -> str:
    """Return the remark on an ensemble, empty for a single model."""
    return f" and the next {models - 1}: figures are means over {models} models" if models > 1 else ""


def engines(trainer: Trainer) -> str:
    """Return the engine of the networks, with its reason, or each of them where they differ."""
    chosen = {norm: f"engine {learner.engine}" for norm, learner in trainer.learners.items()}
    if len(set(chosen.values())) == 1:
        return next(iter(chosen.values()))
    return ", ".join(f"{LABELS[norm]} {engine}" for norm, engine in chosen.items())


def row(trainer: Trainer) -> str:
    """Return the table's row of the last epoch."""
    cells = []
    for learner in trainer.learners.values():
        last = learner.history[-1]
        loss = "diverged" if last["loss"] is None else f"{last['loss']:8.4f}"
        cells.append(f" | {loss:>8} {last['accuracy']:>8.2%} {last['us_per_step']:>9.1f}")
    return f"{last['epoch']:5.4g}{last['step']:8d}{''.join(cells)}"


def answer(result: TrainingResult) -> str:
    """Return the results and the cost of each network, their ratio, and the files."""
    summary = result.summary
    networks = summary["networks"]
    lines = [f"\n{'':24}" + "".join(f"{LABELS[norm]:>20}" for norm in networks)]
    if result.status == "already finished":
        lines.insert(0, "This run had finished already; nothing was changed. Extend it with --epochs or --steps.")

    def line(label: str, key: str, form: Callable[[Any], str]) -> str:
        return f"{label:24}" + "".join(f"{form(network[key]):>20}" for network in networks.values())

    lines += [
        line("test accuracy", "test_accuracy", "{:.2%}".format),
        *([line("± standard deviation", "test_accuracy_spread", "{:.2%}".format)] if result.config.models > 1 else []),
        line("steps to 95 %", "steps_to_95_percent", lambda steps: "not reached" if steps is None else str(steps)),
        line("µs per step", "us_per_step", "{:.1f}".format),
        "",
    ]
    if result.step_time_ratio is not None:
        ratio = result.step_time_ratio
        lines.append(str(ratio) if result.config.command == "train" else ratio.sentence)
    for norm, network in networks.items():
        if network["training_loss"] is None:
            lines.append(f"The loss {LABELS[norm]} is not finite: take a smaller --lr.")
    return "\n".join([*lines, "Files: " + ", ".join(str(path) for path in result.files.values())])
