"""The model families: what they cost at full size, and where to start.

The one source of `ttsnap models` and of the tables in `docs/models.md`; needs no torch. The families stand in
`families.json`; the figures, in `catalogue.json`, come from `python benchmarks/models.py --write`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

SIZES = (512, 1024)
FIGURES = Path(__file__).with_suffix(".json")

START = ((0.15, 0.35, 0.6), (0.4, 0.4, 0.5))  # as published for FLUX.1: calls 3, 7, 12 of 20


@dataclass(frozen=True)
class Family:
    """A model, or models that differ in their weights only.

    Attributes:
        name: as people call it.
        pipeline: class of its diffusers pipeline.
        model: hub id of the checkpoint to try, or the name of an embedded model.
        steps: denoiser calls to start with.
        options: further options of the command.
        passes: of the denoiser per call, with these options.
        rungs, keep: the schedule to start with: looks as shares of the steps, and what survives each.
        published: the schedule is the published one for this model, not a guess.
        note: what a user should know.
        source: where steps, guidance and size were read.
        example: arguments of `ttsnap generate`, where they are others than for most families.
    """

    name: str
    pipeline: str
    model: str
    steps: int = 20
    options: str = ""
    passes: int = 1
    rungs: tuple[float, ...] = START[0]
    keep: tuple[float, ...] = START[1]
    published: bool = False
    note: str = ""
    source: str = ""
    example: str = ""

    @property
    def looks(self) -> list[int]:
        """Calls after which to look, of `steps`."""
        return [max(1, round(share * self.steps)) for share in self.rungs]

    @property
    def schedule(self) -> str:
        """The starting schedule for people: `calls 3, 7, 12 of 20, keep .4, .4, .5`."""
        if not self.rungs:
            return "tuned, ships with it"
        return f"calls {', '.join(map(str, self.looks))} of {self.steps}, keep {_shares(self.keep, ', ')}"

    @property
    def command(self) -> str:
        """A command to copy."""
        if self.example:
            return f"ttsnap generate {self.example}"
        rungs, keep = ",".join(map(str, self.looks)), _shares(self.keep, ",")
        parts = [f'ttsnap generate "a corgi astronaut" --model {self.model} --reward imagereward --candidates 16']
        parts += [f"--steps {self.steps} --rungs {rungs} --keep {keep}", self.options]
        return " ".join(part for part in parts if part)

    @property
    def weights_gb(self) -> float | None:
        """Weights in bfloat16 in GB (1e9 bytes), text encoders and VAE included; None where not counted."""
        parts = figures().get(self.name)
        return None if parts is None else 2e-9 * sum(parts[name] for name in ("denoiser", "text", "vae"))

    def memory_gb(self) -> dict[str, float]:
        """GB (1e9 bytes) of weights by how they are loaded; empty where not counted. Activations come on top.

        With `--offload model` the largest part is there alone, with `group` and `sequential` some of its layers.
        """
        parts = figures().get(self.name)
        if parts is None:
            return {}
        denoiser, others = parts["denoiser"] / 1e9, (parts["text"] + parts["vae"]) / 1e9
        return {
            "float32": 4 * (denoiser + others),
            "bfloat16": 2 * (denoiser + others),
            "quantize int8 or fp8": denoiser + 2 * others,
            "quantize nf4": denoiser / 2 + 2 * others,
            "offload model": 2 * max(denoiser, parts["text"] / 1e9),
        }

    def tflop(self, size: int) -> tuple[float, float] | None:
        """TFLOP of one call (all its passes) and of one decode at `size` x `size` pixels; None where not counted."""
        found = figures().get(self.name, {}).get(str(size))
        return None if found is None else (found[0], found[1])

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object, figures included."""
        counted = {str(size): self.tflop(size) for size in SIZES}
        costs = {size: {"call_tflop": c[0], "decode_tflop": c[1]} if c else None for size, c in counted.items()}
        extra: dict[str, Any] = {"looks": self.looks, "command": self.command, "weights_gb": self.weights_gb}
        extra |= {"memory_gb": self.memory_gb(), "cost": costs}
        return asdict(self) | {"rungs": list(self.rungs), "keep": list(self.keep)} | extra


def _shares(values: Sequence[float], between: str) -> str:
    return between.join(f"{value:g}".removeprefix("0") for value in values)


@cache
def figures() -> dict[str, Any]:
    """Counted parameters and TFLOP by the name of a family."""
    found: dict[str, Any] = json.loads(FIGURES.read_text())
    return found


@cache
def families() -> tuple[Family, ...]:
    """All families, `shapes` first."""
    rows = json.loads(FIGURES.with_name("families.json").read_text(encoding="utf-8"))
    lists = ("rungs", "keep")
    return tuple(Family(**row | {name: tuple(row[name]) for name in lists if name in row}) for row in rows)


def find(names: Sequence[str]) -> list[Family]:
    """The families whose name, pipeline or model contains one of `names`; all where none is given.

    Raises:
        ValueError: a name that fits none.
    """
    chosen = []
    for part in names or [""]:
        fitting = [f for f in families() if part.lower() in f"{f.name} {f.pipeline} {f.model}".lower()]
        if not fitting:
            raise ValueError(f"no model fits {part!r}; known are {', '.join(f.name for f in families())}")
        chosen += [family for family in fitting if family not in chosen]
    return chosen


def _costs(family: Family) -> list[str]:
    """Weights, and call and decode at each size, for people."""
    cells = ["-" if family.weights_gb is None else f"{family.weights_gb:.3g}"]
    for size in SIZES:
        found = family.tflop(size)
        cells.append("-" if found is None else " / ".join(f"{value:.3g}" for value in found))
    return cells


HEAD = ("model", "pipeline", "GB in bf16", "TFLOP 512 px", "1024 px", "start with")


def rows(chosen: Sequence[Family]) -> list[list[str]]:
    """One row of `HEAD` per family; `-` where nothing was counted."""
    return [[f.name, f.pipeline, *_costs(f), f.schedule] for f in chosen]
