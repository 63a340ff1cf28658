"""The settings of one experiment: a YAML file, overrides, checks."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ttsnap.files.text import read_text

MOST = 1 << 20  # bytes of a config
SCHEDULES = ("linear", "cosine", "exponential")
METHODS = ("auto", "lora", "full")
PRECISIONS = ("no", "bf16", "fp16")
TRACKERS = ("tensorboard", "wandb")
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Config:
    """Everything that decides the weights, and where the data lie.

    Attributes:
        tree: image tree to train on.
        labels: recording of its finished images' clean rewards.
        reward: the clean reward to start from; also the name of its column in `labels`.
        eval_tree: image tree of held-out prompts; without it the last prompts of `tree` are held out.
        eval_labels: recording of `eval_tree`.
        held_out: how many prompts of `tree` to hold out; None: a tenth of them, or none where `eval_tree` is given.
        train_prompts: train on so many prompts at most.
        per_prompt: train on so many candidates of each prompt at most.
        levels: denoiser calls whose x0 estimates to learn; None: from three quarters of the way down to the first.
        epochs_per_level: how often each image of a level is seen.
        batch: images in one update, over all processes.
        accumulate: parts in which each process does its share of a batch; changes memory, not results.
        mse: scale of the squared error.
        preference: scale of the Bradley-Terry loss over two images of one prompt.
        temperature: of the Bradley-Terry loss, in units of the reward.
        normalise: measure rewards in standard deviations of the targets in the batch.
        learning_rate: at the top of the first level.
        level_scale: factor on the learning rate from one level to the next.
        schedule: decay within a level: linear, cosine or exponential.
        warmup: part of a level in which the learning rate rises, 0..1.
        floor: part of the learning rate that is left at the end of a level, 0..1.
        weight_decay: of AdamW.
        betas: of AdamW.
        clip: largest norm of the gradient; 0: no clipping.
        precision: no, bf16 or fp16 (mixed).
        checkpointing: save memory: compute activations again in the backward pass (published rewards).
        method: lora, full, or auto: LoRA for rewards above 50 million parameters.
        rank: of the LoRA adapters.
        alpha: of the LoRA adapters; their product is scaled by alpha / rank.
        seed: of the order of images, of adapters and of dropout.
        checkpoint_every: updates between checkpoints.
        log_with: trackers that are told the losses and metrics too: tensorboard, wandb.
    """

    tree: str
    labels: str
    reward: str = "shapes"
    eval_tree: str | None = None
    eval_labels: str | None = None
    held_out: int | None = None
    train_prompts: int | None = None
    per_prompt: int | None = None
    levels: tuple[int, ...] | None = None
    epochs_per_level: int = 1
    batch: int = 64
    accumulate: int = 1
    mse: float = 1.0
    preference: float = 0.0
    temperature: float = 1.0
    normalise: bool = False
    learning_rate: float = 1e-4
    level_scale: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.05
    floor: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, ...] = (0.9, 0.999)
    clip: float = 1.0
    precision: str = "no"
    checkpointing: bool = False
    method: str = "auto"
    rank: int = 16
    alpha: float = 16.0
    seed: int = 0
    checkpoint_every: int = 200
    log_with: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least_one = ("train_prompts", "per_prompt", "epochs_per_level", "batch", "accumulate", "rank")
        for name in (*at_least_one, "checkpoint_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("held_out", "mse", "preference", "weight_decay", "clip", "seed"):
            if (value := getattr(self, name)) is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {value}")
        for name in ("temperature", "learning_rate", "level_scale", "alpha"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("warmup", "floor"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is a part of the whole, 0 to 1, got {value}")
        for name, known in (("schedule", SCHEDULES), ("method", METHODS), ("precision", PRECISIONS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, got {value!r}")
        if self.mse == 0 and self.preference == 0:
            raise ValueError("there is nothing to learn: mse and preference are both 0")
        if self.schedule == "exponential" and self.floor == 0:
            raise ValueError("an exponential schedule needs a floor above 0")
        if self.levels is not None and (not self.levels or min(self.levels) < 1):
            raise ValueError(f"levels are denoiser calls, 1 or more, got {list(self.levels)}")
        if wrong := set(self.log_with) - set(TRACKERS):
            raise ValueError(f"log_with takes {', '.join(TRACKERS)}, got {', '.join(sorted(wrong))}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are two numbers in 0..1, got {list(self.betas)}")
        if self.preference and self.batch % 2:
            raise ValueError(f"the preference loss takes pairs of images: batch must be even, got {self.batch}")
        if (self.eval_tree is None) != (self.eval_labels is None):
            raise ValueError("eval_tree and eval_labels belong together")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """A config from names and values, as YAML or a command line gives them.

        Raises:
            ValueError: an unknown name, a missing one, or a value of the wrong kind or out of range.
        """
        for field in ("tree", "labels"):
            if values.get(field) is None:
                raise ValueError(f"training needs {field}: {'an image tree' if field == 'tree' else 'its recording'}")
        return settings_of(cls, values)

    def settings(self) -> dict[str, Any]:
        """Plain values, for YAML and JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def differences(self, other: Config) -> list[str]:
        """Names of the settings that decide the weights and differ."""
        free = {"eval_tree", "eval_labels", "checkpoint_every", "accumulate", "log_with"}
        names = [field.name for field in fields(self) if field.name not in free]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    @property
    def pairs(self) -> bool:
        """Whether images come in pairs of one prompt."""
        return self.preference > 0


def settings_of(kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """A dataclass of settings from names and values, as YAML or a command line gives them.

    Raises:
        ValueError: an unknown name, or a value of the wrong kind or out of range.
    """
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise ValueError(f"unknown setting {name!r}; known are {', '.join(hints)}")
    return kind(**{name: _convert(name, value, hints[name]) for name, value in values.items()})


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ValueError: it cannot be read, or holds something other than names and values.
    """
    import yaml

    try:
        data = yaml.safe_load(read_text(Path(path), MOST, "the config"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise ValueError(f"{path} must hold settings such as `learning_rate: 0.0001`")
    return data


def write_config(config: Config, path: Path) -> None:
    """The resolved config as YAML, atomically."""
    import yaml

    from ttsnap.files.storage import atomically

    text = yaml.safe_dump(config.settings(), sort_keys=False)
    atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _convert(name: str, value: Any, hint: Any) -> Any:
    """A value of the kind that `hint` names; text is read, for YAML takes 1e-4 for text."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if type(None) in kinds:
            return None
        raise ValueError(f"{name} needs a value")
    kind = kinds[0]
    if typing.get_origin(kind) is tuple:
        values = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(name, part, typing.get_args(kind)[0]) for part in values)
    if kind is bool:
        known = {"true": True, "false": False}
        if str(value).lower() not in known:
            raise ValueError(f"{name} is true or false, got {value!r}")
        return known[str(value).lower()]
    try:
        if isinstance(value, bool) or (kind is int and float(value) != int(float(value))):
            raise ValueError
        return value if isinstance(value, kind) else kind(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError, OverflowError):
        what = {int: "a whole number", float: "a number"}.get(kind, "text")
        raise ValueError(f"{name} takes {what}, got {value!r}") from None
