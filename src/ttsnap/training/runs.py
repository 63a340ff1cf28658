"""A training run on disk.

    RUN/run.json                        what it is, and the levels trained so far
    RUN/config.yaml                     the resolved config
    RUN/sigma-0.250000.safetensors      trained tensors of a level, named by its noise level
    RUN/checkpoint.safetensors          tensors and optimiser in the middle of a level
    RUN/log.jsonl                       losses and learning rate, one line per update
    RUN/evaluation.json                 how well it does on held-out prompts: before, during (by level), after
    RUN/evaluation.png, losses.png      the same as pictures, and the losses (also as SVG)

Each file but the log is renamed into place; the log is cut back to the checkpoint when a run is gone on with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap.files.provenance import versions
from ttsnap.files.storage import atomically, write, write_json
from ttsnap.rewards.noise_aware import FORMAT, VERSION, check_fit, read_run
from ttsnap.rewards.registry import RUN, is_run
from ttsnap.training.config import Config, read_config, write_config
from ttsnap.training.curriculum import Level

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Run:
    """The directory of a run, and what it is of.

    Attributes:
        root: the directory.
        config: resolved.
        method: `lora` or `full`.
        fingerprint: of the training data.
    """

    root: Path
    config: Config
    method: str
    fingerprint: str

    def check(self) -> None:
        """Raise ValueError if something else is there."""
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"output path {self.root} is a file; give a directory")
        if not is_run(self.root):
            if self.root.is_dir() and any(self.root.iterdir()):
                raise ValueError(f"{self.root} is not empty and not a training run; give another --out")
            return
        found = read_run(self.root)
        different = self.config.differences(Config.of(read_config(self.root / "config.yaml")))
        if found["method"] != self.method:
            different.append("method")
        if found.get("data") != self.fingerprint and not different:
            different.append("the data")
        if different:
            raise ValueError(
                f"{self.root} was begun with other settings ({', '.join(different)} differ); give another --out"
            )

    def begin(self) -> None:
        """Write config and description, unless they are there."""
        self.root.mkdir(parents=True, exist_ok=True)
        if is_run(self.root):
            return
        write_config(self.config, self.root / "config.yaml")
        description = {
            "format": FORMAT,
            "version": VERSION,
            "made by": "ttsnap train",
            "reward": self.config.reward,
            "method": self.method,
            "rank": self.config.rank,
            "alpha": self.config.alpha,
            "data": self.fingerprint,
            "versions": versions(),
            "levels": [],
        }
        write_json(description, self.root / RUN)

    @property
    def evaluation(self) -> dict[str, Any]:
        """What is measured so far, by `before`, `during` and `after`."""
        path = self.root / "evaluation.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def save_evaluation(self, when: str, measured: Mapping[str, Any]) -> None:
        """Add measurements by call."""
        everything = self.evaluation
        everything[when] = everything.get(when, {}) | dict(measured)
        write_json(everything, self.root / "evaluation.json")

    def save_level(self, level: Level, trained: Mapping[str, Tensor]) -> None:
        """Store the weights of a level, then name them in the description."""
        metadata = {"sigma": repr(level.sigma), "call": str(level.call)}
        _save({name: tensor.detach() for name, tensor in trained.items()}, metadata, self.root / level.file)
        description = read_run(self.root)
        levels = [known for known in description["levels"] if known["sigma"] != level.sigma]
        description["levels"] = [*levels, {"call": level.call, "sigma": level.sigma, "file": level.file}]
        write_json(description, self.root / RUN)

    def save_checkpoint(
        self, stage: int, update: int, trained: Mapping[str, nn.Parameter], optimiser: Optimizer, scaler: Any
    ) -> None:
        """Store everything that is needed to go on with update `update` of level number `stage`."""
        tensors = {f"weight/{name}": parameter.detach() for name, parameter in trained.items()}
        for name, parameter in trained.items():
            for key, value in optimiser.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        metadata = {"stage": str(stage), "update": str(update)}
        if scaler is not None:
            metadata["scaler"] = json.dumps(scaler.state_dict())
        _save(tensors, metadata, self.root / CHECKPOINT)

    def restore(self, trained: Mapping[str, nn.Parameter], optimiser: Optimizer, scaler: Any) -> tuple[int, int]:
        """Level number and update to go on with, after loading weights and optimiser; (0, 0) without a checkpoint.

        Raises:
            ValueError: the checkpoint is damaged or does not fit.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        path = self.root / CHECKPOINT
        if not path.exists():
            return 0, 0
        states: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    kind, _, name = key.partition("/")
                    states.setdefault(kind, {})[name] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
        weights = states.pop("weight", {})
        check_fit(weights, trained, f"the tensors of {path}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])
                state = {kind: values[name] for kind, values in states.items()}
                optimiser.state[parameter] = {
                    kind: value if kind == "step" else value.to(parameter.device) for kind, value in state.items()
                }
        if scaler is not None and "scaler" in metadata:
            scaler.load_state_dict(json.loads(metadata["scaler"]))
        return int(metadata["stage"]), int(metadata["update"])

    def draw(self, prompts: int) -> None:
        """Pictures of the losses and, where some prompts were held out, of how well it does on them."""
        from ttsnap.files.figures import save
        from ttsnap.training import plots

        figures = {"losses": plots.losses(read_log(self.log))}
        if prompts:
            figures["evaluation"] = plots.evaluation(self.evaluation, prompts)
        save(figures, self.root)

    @property
    def log(self) -> Path:
        """One JSON object per update."""
        return self.root / "log.jsonl"

    def cut_log(self, stage: int, update: int) -> None:
        """Forget the updates from there on: they will be done again."""
        kept = [line for line in read_log(self.log) if (line["stage"], line["update"]) < (stage, update)]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        atomically(self.log, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The updates in a log; a last line that a kill cut off does not count."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _save(tensors: Mapping[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    from safetensors.torch import save

    plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write(path, save(plain, metadata))
