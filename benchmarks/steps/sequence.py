"""LSTMs with recurrent batch norm, with layer norm and without a norm, over several seeds: curves and steps they take.

``python -m benchmarks.steps.sequence`` trains what ``bnkernels train-sequence --models 3`` trains, once for each way to
read an image, and writes ``sequence.json`` and ``sequence.png`` into the results of the device, or into ``--out DIR``.
After every way both are whole, so that Ctrl-C keeps what was trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.timing import facts, results_folder, write_json
from bnkernels.train.files import write_atomically
from bnkernels.train.plots import draw_history, finish_axes, png, require_matplotlib
from bnkernels.train.run_config import ConfigError
from bnkernels.train.sequence import SequenceConfig
from bnkernels.train.trainer import TrainingResult, train

WAYS: dict[str, dict[str, Any]] = {
    "pixel by pixel": {},
    "pixels permuted": {"permute": "permutation"},
    "row by row": {"read": "rows"},
}
MODELS = 3
SETTINGS = ("dataset", "hidden", "batch_size", "optimizer", "lr", "clip", "noise", "seed", "models", "dtype")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    options = parse(arguments)
    require_matplotlib()
    given = {name: value for name, value in vars(options).items() if name not in ("out", "place", "ways")}
    document: dict[str, Any] = facts(place=options.place)
    out = options.out or results_folder(document)
    for way in options.ways or WAYS:
        try:
            config = SequenceConfig(device=options.place, **given | WAYS[way])
        except ConfigError as error:
            sys.exit(f"error: {error}")
        print(f"{way}: {config.models} models of each network", flush=True)
        result = train(config, on_epoch=say)
        document.setdefault("settings", {name: getattr(config, name) for name in SETTINGS})
        document.setdefault("ways", {})[way] = summary(result)
        write_json(out / "sequence.json", document)
        write_atomically(out / "sequence.png", draw(document))
    print(f"written: {out / 'sequence.json'} and {out / 'sequence.png'}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps.sequence", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--place", choices=("cpu", "cuda"), default="cpu", help="where to train (default: cpu)")
    add("--ways", choices=tuple(WAYS), nargs="+", metavar="WAY", help=f"ways to read: {', '.join(WAYS)} (default: all)")
    add("--out", type=Path, metavar="DIR", help="folder of document and picture (default: the results of the device)")
    default = SequenceConfig()
    add("--dataset", choices=SequenceConfig.choices["dataset"], default=default.dataset, help="as for train-sequence")
    add("--data", metavar="PATH", help="as for train-sequence")
    for name, about in (("hidden", "hidden units"), ("batch_size", "examples per step"), ("seed", "first seed")):
        usual = getattr(default, name)
        add(f"--{name.replace('_', '-')}", type=int, default=usual, metavar="N", help=f"{about} (default: {usual})")
    add("--epochs", type=int, default=default.epochs, metavar="N", help=f"epochs (default: {default.epochs})")
    add(
        "--models",
        type=int,
        default=MODELS,
        metavar="N",
        help=f"models of each network, at least 2 (default: {MODELS})",
    )
    options = parser.parse_args(arguments)
    if options.models < 2:
        parser.error(f"--models must be at least 2, to have a spread; got {options.models}")
    return options


def say(trainer: Any) -> None:
    """Print the accuracies that were reached."""
    reached = {norm: learner.history[-1]["accuracy"] for norm, learner in trainer.learners.items() if learner.history}
    if reached:
        print(
            f"epoch {trainer.epoch}: " + ", ".join(f"{norm} {found:.1%}" for norm, found in reached.items()), flush=True
        )


def summary(result: TrainingResult) -> dict[str, Any]:
    """Return the curves of each network, and what a step of it takes, as JSON can hold them."""
    networks = result.summary["networks"]
    return {
        norm: {
            "us_per_step": round(networks[norm]["us_per_step"], 1),
            "steps": [entry["step"] for entry in history],
            **{
                name: [[rounded(model[name]) for model in entry["models"]] for entry in history]
                for name in ("loss", "accuracy")
            },
        }
        for norm, history in result.history.items()
    }


def rounded(value: float | None) -> float | None:
    """Return a figure to four digits behind the point; None where it is not finite."""
    return None if value is None else round(value, 4)


def histories(networks: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the accuracies of each network as the trainer's pictures take them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for norm, curves in networks.items():
        found[norm] = [
            {"step": step, "accuracy": sum(models) / len(models), "models": [{"accuracy": one} for one in models]}
            for step, models in zip(curves["steps"], curves["accuracy"], strict=True)
        ]
    return found


def draw(document: Mapping[str, Any]) -> bytes:
    """Return the picture of a document: for every way to read, mean and range of the accuracies over the steps."""
    from matplotlib.figure import Figure

    ways, settings = document["ways"], document["settings"]
    figure = Figure(figsize=(4.5 * len(ways) + 1, 4.5), dpi=120, layout="constrained")
    title = f"{settings['dataset']}, LSTM of {settings['hidden']} units, {settings['optimizer']} at {settings['lr']:g}"
    figure.suptitle(f"{title}, {settings['models']} seeds: mean, lowest and highest", fontsize=11)
    for axes, (way, networks) in zip(
        figure.subplots(1, len(ways), sharey=True, squeeze=False)[0], ways.items(), strict=True
    ):
        draw_history(axes, histories(networks), "accuracy", 100)
        axes.set(title=way)
        finish_axes(axes, loc="lower right")
    figure.axes[0].set_ylabel("test accuracy (%)")
    return png(figure)


if __name__ == "__main__":
    sys.exit(main())
