"""Train the tiny preview decoder of the embedded model: the shipped VAE's pictures of x0 estimates, for less.

    python -m tools.shapes.preview     # the shipped weights; killed and run again, it goes on

An `AutoencoderTiny` learns to repeat what the full decoder makes of x0 estimates of training prompts after every call:
blurs and mixtures as well as finished images, for these are what early looks see. Its pictures have half the size:
most of a decoder's work is in the last doubling, which the reward does not need. Its encoder is never used and stays as
it was made.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from tools.shapes import common
from tools.shapes.vae import reconstruction_loss
from ttsnap.pipelines.sampler import Sampler
from ttsnap.shapes.pipeline import OPTIONS, PREVIEW_WEIGHTS, load_pipeline
from ttsnap.shapes.scenes import train_prompts


def build(width: int, blocks: tuple[int, ...]) -> AutoencoderTiny:
    """The tiny decoder: `width` channels, so many residual blocks at 8, 16, 32, ... pixels."""
    levels = len(blocks)
    return AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(4,) * levels,
        decoder_block_out_channels=(width,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=blocks,
    )


@torch.no_grad()
def pairs(sampler: Sampler, prompts: int, per_prompt: int) -> tuple[Tensor, Tensor]:
    """Normalised latents [n, 8, 8, 8] of x0 estimates, and the full decoder's pictures [n, 3, 64, 64] (bytes)."""
    latents, pictures = [], []
    texts = [prompt for prompt in train_prompts()[:prompts] for _ in range(per_prompt)]
    for start in range(0, len(texts), sampler.max_batch):
        part = texts[start : start + sampler.max_batch]
        state = sampler.start(part, [10_000 + start + row for row in range(len(part))])
        for step in range(1, sampler.num_steps + 1):
            state = sampler.advance(state, step)
            assert state.x0 is not None
            latents.append(sampler.normalised(sampler.spatial(state.x0)))
            pictures.append((sampler.decode(state.x0) * 255).round().byte())
    return torch.cat(latents), torch.cat(pictures)


def train(
    vae: AutoencoderTiny, latents: Tensor, pictures: Tensor, checkpoint: Path, steps: int, batch: int, rate: float
) -> None:
    """The loop; one process, three minutes of one idle core."""
    decoder = vae.decoder.train()
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=1e-3)
    ema = common.Ema({"decoder": decoder}, 0.998)
    begin = 0
    if state := common.load(checkpoint):
        decoder.load_state_dict(state["decoder"])
        optimiser.load_state_dict(state["optimiser"])
        ema.state, begin = state["ema"], state["step"]
    for step in range(begin, steps):
        generator = torch.Generator().manual_seed(step)
        for group in optimiser.param_groups:
            group["lr"] = rate * common.schedule(step / steps, decay=0.6)
        rows = torch.randint(len(latents), (batch,), generator=generator)
        made = decoder(latents[rows])
        target = F.interpolate(pictures[rows].float(), made.shape[-2:], mode="area") / 127.5 - 1
        loss = reconstruction_loss(made, target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimiser.step()
        ema.update(step)
        if (step + 1) % 250 == 0:
            print(f"step {step + 1} of {steps}, loss {loss.item():.4f}", flush=True)
            done = {"decoder": decoder.state_dict(), "optimiser": optimiser.state_dict(), "ema": ema.state}
            common.save(done | {"step": step + 1}, checkpoint)
    decoder.load_state_dict(ema.state["decoder"])


def main() -> None:
    """Parse, make the pairs (or take those there), train, save in fp16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PREVIEW_WEIGHTS)
    parser.add_argument("--pairs", type=Path, default=Path("runs/preview-pairs.pt"))
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/preview.pt"))
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--per-prompt", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--blocks", default="4,4,0")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=4e-3)
    a = parser.parse_args()
    torch.manual_seed(0)
    state = common.load(a.pairs)
    if state is None:
        latents, pictures = pairs(Sampler(load_pipeline(), **OPTIONS, max_batch=64), a.prompts, a.per_prompt)
        state = {"latents": latents, "pictures": pictures}
        common.save(state, a.pairs)
    vae = build(a.width, tuple(int(count) for count in a.blocks.split(",")))
    train(vae, state["latents"], state["pictures"], a.checkpoint, a.steps, a.batch, a.rate)
    vae.to(dtype=torch.float16).save_pretrained(a.out)


if __name__ == "__main__":
    main()
