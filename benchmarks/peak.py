"""Peak memory of one batch at full size, counted: what SDXL and FLUX need beside their weights at 1024 px.

    python benchmarks/peak.py            # a table as Markdown, in two minutes, with no GPU and no weights

Each model runs on tensors without data (torch's fake tensors) in bf16, and torch's memory tracker keeps the largest sum
of all that lives at a time. Attention is the kind that never has the whole matrix. What a GPU's own libraries need
beside that is not counted: an H200 needed 10.1 GiB for 64 rows of SDXL's UNet and 7.3 for 16 of FLUX.1, within 3 % of
what is counted, but 2.0 GiB for each picture of the decoder, where 1.5 are counted (workspaces of convolutions).
"""

from __future__ import annotations

import argparse

import torch
from diffusers import FluxTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from random_models import made_on, sdxl

SIDE = 128  # of the latents of 1024 pixels


def unet(model, rows):
    """One call of SDXL's denoiser."""
    more = {"text_embeds": torch.empty(rows, 1280), "time_ids": torch.empty(rows, 6)}
    noise, text = torch.empty(rows, 4, SIDE, SIDE), torch.empty(rows, 77, 2048)
    model(noise, torch.empty(rows), text, added_cond_kwargs=more)


def transformer(model, rows):
    """One call of FLUX.1's denoiser."""
    words, patches = 512, (SIDE // 2) ** 2
    model(
        hidden_states=torch.empty(rows, patches, 64),
        encoder_hidden_states=torch.empty(rows, words, 4096),
        pooled_projections=torch.empty(rows, 768),
        timestep=torch.empty(rows),
        guidance=torch.empty(rows),
        img_ids=torch.empty(patches, 3),
        txt_ids=torch.empty(words, 3),
    )


def decode(model, rows):
    """Pictures of latents."""
    model.decode(torch.empty(rows, model.config.latent_channels, SIDE, SIDE))


def counted(build, call, rows) -> float:
    """GiB beside the weights, for one call of a model."""
    with FakeTensorMode(), made_on("cpu", torch.bfloat16):
        model = build().requires_grad_(True)  # or the tracker cannot hook them
        tracker = MemTracker()
        tracker.track_external(model)
        with torch.no_grad(), tracker:
            call(model, rows)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    most = sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
    return (most - weights) / 2**30


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| one batch at 1024 px | rows | GiB beside the weights |\n|---|---|---|")
    whole = ("cpu", torch.bfloat16, True)
    for name, build, call, rows in (
        ("SDXL, 16 candidates with guidance (the most by default)", lambda: sdxl(*whole).unet, unet, 32),
        ("SDXL, 32 candidates with guidance", lambda: sdxl(*whole).unet, unet, 64),
        (
            "FLUX.1 dev, 16 candidates (the most by default)",
            lambda: FluxTransformer2DModel(guidance_embeds=True),
            transformer,
            16,
        ),
        ("SDXL, 4 pictures decoded (the most by default)", lambda: sdxl(*whole).vae, decode, 4),
        ("SDXL, 8 pictures decoded", lambda: sdxl(*whole).vae, decode, 8),
    ):
        print(f"| {name} | {rows} | {counted(build, call, rows):.1f} |", flush=True)


if __name__ == "__main__":
    main()
