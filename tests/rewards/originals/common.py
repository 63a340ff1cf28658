"""What the scripts share: they are told prompts and images, and answer with rewards."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def read(folder: Path) -> tuple[list[str], list[Path]]:
    """Prompts and image files."""
    return json.loads((folder / "prompts.json").read_text()), sorted((folder / "images").iterdir())


def write(folder: Path, rewards: list[list[float]], **more: object) -> None:
    """Rewards [prompts][images], and what else is to be compared."""
    (folder / "expected.json").write_text(json.dumps({"rewards": rewards, **more}))


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """New random weights, such that signals keep their size: small, zero or equal ones would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        elif parameter.ndim == 1:  # of norms the weights, else biases
            parameter.data = 0.2 * noise + name.endswith("weight")
    return model
