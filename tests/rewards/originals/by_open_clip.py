"""open_clip's CLIP on random weights: small (its layout at reduced depth), or `full`, the ViT-H-14 of HPSv2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import open_clip
import torch
from common import shake, write
from open_clip.model import CLIP

folder = Path(sys.argv[1])
SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 48, "head_width": 12, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


def main() -> None:
    model = shake(CLIP(**SMALL).eval())
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_v2_compressed.pt")
    prompts, pixels = json.loads((folder / "prompts.json").read_text()), torch.load(folder / "pixels.pt")
    tokens = open_clip.get_tokenizer("ViT-H-14")(prompts)
    with torch.no_grad():
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(tokens[:4], normalize=True)
    write(folder, (text @ image.T).tolist(), tokens=tokens.tolist())


main()
