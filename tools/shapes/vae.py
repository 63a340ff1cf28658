"""Train the VAE of the embedded model.

    python -m tools.shapes.vae --out runs/vae --minutes 10 --decoder-minutes 6

First everything together, then the decoder alone on frozen latents. Then the latents' scale is measured and the VAE is
saved as a diffusers directory `<out>/vae`. Run it again after a kill: it goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from tools.shapes import common
from ttsnap.shapes.scenes import COLOURS, SHAPES, Scene, Thing, render_batch, sample_scene, sample_spec

KL = 3e-4


def build() -> AutoencoderKL:
    """The VAE: f=8, 8 latent channels, no attention; at least 4 channels per norm group (fewer remove the colour)."""
    widths = (8, 12, 24, 32)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
        force_upcast=False,
    )


def any_scene(rng: np.random.Generator) -> Scene:
    """Mostly scenes that prompts describe; some with 0 to 3 things anywhere, so that failures can be shown too."""
    if rng.random() < 0.8:
        return sample_scene(sample_spec(rng), rng)
    names = tuple(COLOURS)
    return Scene(
        tuple(
            Thing(
                names[rng.integers(6)],
                SHAPES[rng.integers(3)],
                rng.uniform(10, 54),
                rng.uniform(10, 54),
                rng.uniform(6, 13),
            )
            for _ in range(rng.integers(0, 4))
        )
    )


def batch_of(rng: np.random.Generator, size: int) -> Tensor:
    """Images [size, 3, 64, 64] in -1..1."""
    return common.to_tensor(render_batch([any_scene(rng) for _ in range(size)]))


def reconstruction_loss(output: Tensor, target: Tensor, reach: int = 1) -> Tensor:
    """L1 on colours and on chroma, things (and what lies within `reach` / 2 pixels) weighing more than the rest."""
    ground = target[:, :, :1, :1]
    near = ((target - ground).abs().amax(1, keepdim=True) > 0.05).float()
    weight = 1 + 5 * F.max_pool2d(near, reach, 1, reach // 2)
    error = output - target
    chroma = error - error.mean(1, keepdim=True)
    return ((error.abs() + chroma.abs() + 2 * error.square()) * weight).mean()


def train(rank: int, out: Path, minutes: float, decoder_minutes: float, batch: int, rate: float) -> None:
    """The loop of one process."""
    torch.manual_seed(0)
    vae = build().to(memory_format=torch.channels_last)
    ema = common.Ema({"vae": vae}, 0.998)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.97), weight_decay=1e-3)
    log = common.Log(out) if rank == 0 else None
    step, spent, stage = 0, 0.0, 0
    if state := common.load(out / "checkpoint.pt"):
        vae.load_state_dict(state["vae"])
        ema.state = state["ema"]
        optimiser.load_state_dict(state["optimiser"])
        step, spent, stage = state["step"], state["spent"], state["stage"]
    rng = np.random.default_rng([rank, step])
    torch.manual_seed(1000 * step + rank)
    limits = (minutes * 60, decoder_minutes * 60)
    last, saved = time.time(), time.time()
    while stage < 2:
        progress = spent / limits[stage]
        for group in optimiser.param_groups:
            group["lr"] = rate * common.schedule(progress, decay=0.5) * (1.0 if stage == 0 else 0.7)
        images = batch_of(rng, batch).contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(stage == 0):
            posterior = vae.encode(images).latent_dist
            kl = posterior.kl().mean() / 512
        if stage == 0:
            latents = posterior.sample()
        else:
            noise = 0.03 * torch.rand(len(images), 1, 1, 1) * posterior.mean.std()
            latents = posterior.mean + noise * torch.randn_like(posterior.mean)
        rec = reconstruction_loss(vae.decode(latents).sample, images)
        optimiser.zero_grad()
        (rec + KL * kl if stage == 0 else rec).backward()
        common.average_gradients(vae.parameters())
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        ema.update(step)
        now = time.time()
        spent = common.same_on_all(spent + now - last)
        last = now
        if log and step % 50 == 0:
            log(stage=stage, step=step, rec=rec.item(), kl=kl.item(), progress=progress)
        if spent >= limits[stage]:
            vae.load_state_dict(ema.state["vae"])
            if log:
                save_vae(vae, out / f"vae_stage{stage}")
            stage, spent, saved = stage + 1, 0.0, 0.0
            for p in vae.encoder.parameters():
                p.requires_grad_(False)
                p.grad = None
            torch.distributed.barrier()
            last = time.time()
        if rank == 0 and now - saved > 60:
            state = {"vae": vae.state_dict(), "ema": ema.state, "optimiser": optimiser.state_dict()}
            common.save(state | {"step": step, "spent": spent, "stage": stage}, out / "checkpoint.pt")
            saved = now


@torch.no_grad()
def save_vae(vae: AutoencoderKL, folder: Path) -> None:
    """Measure the scale of the latents, so that they have unit variance, and save the VAE."""
    rng = np.random.default_rng(7)
    latents = torch.cat([vae.encode(batch_of(rng, 128)).latent_dist.mean for _ in range(8)])
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 5), scaling_factor=round(float(1 / latents.std()), 5)
    )
    vae.save_pretrained(folder)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/vae"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--decoder-minutes", type=float, default=6)
    parser.add_argument("--batch", type=int, default=64, help="per process")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--processes", type=int, default=2)
    a = parser.parse_args()
    common.launch(train, a.processes, a.out, a.minutes, a.decoder_minutes, a.batch, a.rate)


if __name__ == "__main__":
    main()
