"""Experiment trackers: TensorBoard and Weights & Biases through accelerate, when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from ttsnap.training.config import Config
from ttsnap.training.runs import Run

INSTALL = {"tensorboard": "pip install 'ttsnap[train]'", "wandb": "pip install wandb"}


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ValueError if a tracker that is asked for is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"log_with {name}: it is not installed; {INSTALL[name]}")


def start(accelerator: Any, run: Run, config: Config, update: int) -> None:
    """Begin to track, or go on from an update; TensorBoard drops what it was told of later ones.

    TensorBoard writes to RUN/tensorboard, Weights & Biases to RUN/wandb and wherever its own settings say.

    Args:
        accelerator: made with `log_with` and the run as its project.
        run: the run; its directory must be there.
        config: kept as the configuration of the experiment.
        update: number of updates done before, over all levels.
    """
    if not config.log_with:
        return
    plain = {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in config.settings().items()
    }
    options = {
        "tensorboard": {"purge_step": update},
        "wandb": {"name": run.root.name, "id": f"{run.root.name}-{run.fingerprint}", "resume": "allow"}
        | {"dir": str(run.root)},
    }
    accelerator.init_trackers(
        "tensorboard", config=plain, init_kwargs={name: options[name] for name in config.log_with}
    )


def losses(line: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker is told of an update: the numbers of a line of the log, under `train/`."""
    names = ("loss", "mse", "preference", "learning_rate", "gradient_norm", "call")
    return {f"train/{name}": float(line[name]) for name in names if line[name] is not None}


def metrics(when: str, measured: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """What a tracker is told of an evaluation: each metric of each call, under `before/`, `during/` or `after/`."""
    return {
        f"{when}/{metric}/call {call}": float(value)
        for call, values in measured.items()
        for metric, value in values.items()
        if value is not None
    }
