"""Images that checkpoints of the transformer make of training prompts: more malformed images for the reward.

python -m tools.shapes.generated --transformer runs/transformer/final.pt --count 1024 --out runs/extra.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from tools.shapes import common
from tools.shapes.transformer import Prompts, build, sample, to_images
from ttsnap.shapes.scenes import train_prompts


@torch.no_grad()
def main() -> None:
    """Parse, sample with each checkpoint in turn, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae_stage1"))
    parser.add_argument("--text", type=Path, default=Path("runs/text"))
    parser.add_argument("--transformer", type=Path, nargs="+", default=[Path("runs/transformer/final.pt")])
    parser.add_argument("--count", type=int, default=1024, help="images per checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/extra.pt"))
    a = parser.parse_args()
    vae, prompts = AutoencoderKL.from_pretrained(a.vae), train_prompts()
    text = Prompts(a.text, prompts)
    rng, generator = np.random.default_rng(17), torch.Generator().manual_seed(17)
    images, asked = [], []
    for path in a.transformer:
        state = common.load(path)
        if state is None:
            raise FileNotFoundError(path)
        model = build(state["heads"])
        model.load_state_dict(state["model"])
        for start in range(0, a.count, 64):
            part = [prompts[i] for i in rng.integers(len(prompts), size=min(64, a.count - start))]
            noise = torch.randn(len(part), 16, 32, generator=generator)
            images.append(to_images(vae, sample(model, text(torch.tensor([text.index[p] for p in part])), noise)))
            asked += part
    common.save({"images": torch.from_numpy(np.concatenate(images)), "prompts": asked}, a.out)


if __name__ == "__main__":
    main()
