"""Put the trained parts together as the directory that `FluxPipeline.from_pretrained` loads, in fp16.

python -m tools.shapes.export --vae runs/vae/vae_stage1 --text runs/text --transformer runs/transformer/final.pt
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from tools.shapes import common
from tools.shapes.transformer import build
from ttsnap.shapes.pipeline import WEIGHTS


def export(vae: Path, text: Path, transformer: Path, out: Path) -> None:
    """Write the pipeline directory, replacing the one that is there."""
    state = common.load(transformer)
    if state is None:
        raise FileNotFoundError(f"no transformer weights at {transformer}")
    model = build(state["heads"])
    model.load_state_dict(state["model"])
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(vae),
        text_encoder=CLIPTextModel.from_pretrained(text / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(text / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(text / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(text / "tokenizer_2"),
        transformer=model,
    ).to(dtype=torch.float16)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.save_pretrained(temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae_stage1"))
    parser.add_argument("--text", type=Path, default=Path("runs/text"))
    parser.add_argument("--transformer", type=Path, default=Path("runs/transformer/final.pt"))
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    a = parser.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    export(a.vae, a.text, a.transformer, a.out)


if __name__ == "__main__":
    main()
