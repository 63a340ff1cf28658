"""The embedded model: a tiny but genuine FLUX pipeline, loaded from the package's own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ttsnap.pipelines.models import Model
from ttsnap.shapes.scenes import held_out_prompts, parse, train_prompts

WEIGHTS = Path(__file__).parent / "weights" / "pipeline"
PREVIEW_WEIGHTS = WEIGHTS.with_name("preview")  # its tiny decoder for early looks
SIZE, NUM_STEPS, MAX_SEQUENCE_LENGTH = 64, 20, 12
OPTIONS: dict[str, Any] = {
    "num_inference_steps": NUM_STEPS,
    "height": SIZE,
    "width": SIZE,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
}


def load_pipeline(dtype: Any = None, device: Any = "cpu", folder: Path = WEIGHTS) -> Any:
    """The stock `FluxPipeline` of the shapes world (fp32 unless told otherwise).

    To sample from it directly, pass `height=64, width=64, num_inference_steps=20, max_sequence_length=12`: the
    pipeline's own defaults are those of FLUX.1.
    """
    import torch
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtype or torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


MODEL = Model(
    load_pipeline,
    WEIGHTS,
    arguments=OPTIONS,
    reward="shapes-aware",
    pushed_reward="shapes",
    report="shapes-checker",
    candidates=8,  # more find a perfect picture in any way
    preview=PREVIEW_WEIGHTS,
    prompts={"train": train_prompts, "held-out": held_out_prompts},
    example="a red circle left of a blue square",
    reads=parse,
)
