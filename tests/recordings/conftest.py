"""Small recordings and value folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("zarr")


def write_values(
    folder: Path, reward: str, base: np.ndarray, naft: np.ndarray | None = None, model: str = "flux"
) -> None:
    """Values [prompts, images, steps] in the published layout; noise-aware steps that are NaN get no file."""
    for kind, values in (("base", base), ("naft", naft)):
        if values is None:
            continue
        inner = folder / f"{model}_{reward}_val_{kind}"
        inner.mkdir(parents=True)
        prompts, images, steps = values.shape
        for step in range(steps):
            if np.isnan(values[..., step]).any():
                continue
            rows = {p: [float(v) for v in values[p, :, step]] for p in range(prompts)}
            (inner / f"p{prompts}_i{images}_s{step:02d}.yaml").write_text(
                yaml.safe_dump(rows, default_flow_style=False)
            )


@pytest.fixture
def values(tmp_path: Path) -> Path:
    """Two rewards, 3 prompts x 4 images x 5 steps, noise-aware at the first 3 steps."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "values"
    for reward in ("hps", "imr"):
        base = rng.normal(size=(3, 4, 5)).astype(np.float32)
        naft = base + np.float32(10)
        naft[..., 3:] = np.nan
        write_values(folder, reward, base, naft)
    return folder
