"""Train the transformer of the embedded model by flow matching on VAE latents.

    python -m tools.shapes.transformer --vae runs/vae/vae_stage1 --out runs/transformer

Two gloo processes of one thread each. Half of the noise levels lie above 0.75, where the layout is decided. Text
encoders are frozen, so prompts are encoded once. In the last third captions are loose: see `miscaption`. Run it again
after a kill: it goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from tools.shapes import common
from tools.shapes.text import WIDTH, token_ids
from ttsnap.shapes.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Spec,
    held_out_prompts,
    is_held_out,
    parse,
    render_batch,
    sample_scene,
    sample_spec,
)

SIDE = 4  # packed latents: 4 x 4 tokens of 2 x 2 x 8 channels


def build(heads: int) -> FluxTransformer2DModel:
    """The transformer; modulation and output start at zero, so that every block starts as the identity."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    for name, parameter in model.named_parameters():
        if ("norm" in name and "linear" in name) or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
    return model


class Muon:
    """Momentum steps with orthogonalised matrices (Jordan et al., 2024); the processes share the work."""

    def __init__(self, parameters: list[torch.nn.Parameter], momentum: float = 0.95) -> None:
        self.parameters = parameters
        self.momentum = momentum
        self.buffers = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step at that learning rate."""
        rank, world = dist.get_rank(), dist.get_world_size()
        updates = [torch.zeros_like(p) for p in self.parameters]
        for index, (p, buffer) in enumerate(zip(self.parameters, self.buffers, strict=True)):
            assert p.grad is not None
            buffer.lerp_(p.grad, 1 - self.momentum)
            if index % world == rank:
                updates[index] = orthogonal(p.grad.lerp(buffer, self.momentum))
        flat = torch.cat([u.flatten() for u in updates])
        if world > 1:
            dist.all_reduce(flat)
        start = 0
        for p in self.parameters:
            update = flat[start : start + p.numel()].view_as(p)
            p.mul_(1 - rate * 0.01).add_(update, alpha=-rate * max(1, p.shape[0] / p.shape[1]) ** 0.5)
            start += p.numel()


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


@torch.no_grad()
def dataset(rank: int, count: int, vae: AutoencoderKL, path: Path) -> tuple[Tensor, list[str], list[str]]:
    """Packed latents [count, 16, 32] of random scenes, true and loose captions; kept on disk for the next start."""
    state = common.load(path)
    if state is None:
        rng = np.random.default_rng([11, rank])
        latents, true, loose = [], [], []
        for _ in range(count // 256):
            specs = [sample_spec(rng) for _ in range(256)]
            images = common.to_tensor(render_batch([sample_scene(spec, rng) for spec in specs]))
            latents.append(pack(encode(vae, images)).half())
            true += [spec.prompt for spec in specs]
            loose += [miscaption(spec, rng).prompt for spec in specs]
        state = {"latents": torch.cat(latents), "true": true, "loose": loose}
        common.save(state, path)
    return state["latents"], state["true"], state["loose"]


def miscaption(spec: Spec, rng: np.random.Generator) -> Spec:
    """A loose caption of an image that shows `spec`: about a third of them say one thing that is not so.

    A model of true captions follows its prompts and leaves a search nothing to do. One that goes on with loose captions
    paints as clearly, but often not what it was asked for, as large models do.
    """
    while True:
        other = _miscaption(spec, rng)
        if not is_held_out(other) and len(set(other.things)) == len(other.things):
            return other


def _miscaption(spec: Spec, rng: np.random.Generator) -> Spec:
    things, which, chance = list(spec.things), int(rng.integers(len(spec.things))), rng.random()
    if chance < 0.12:
        things[which] = things[which]._replace(shape=SHAPES[rng.integers(len(SHAPES))])
    elif chance < 0.22:
        things[which] = things[which]._replace(colour=tuple(COLOURS)[rng.integers(len(COLOURS))])
    elif len(things) == 2 and chance < 0.36:
        return Spec(spec.things, (RELATIONS[rng.integers(len(RELATIONS))],))
    elif len(things) == 1 and chance < 0.60:  # it tells of a second thing
        return Spec((*things, sample_spec(rng, single=1).things[0]), (RELATIONS[rng.integers(len(RELATIONS))],))
    return Spec(tuple(things), spec.relations)


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Normalised latents [n, 8, 8, 8] of images in -1..1."""
    return (vae.encode(images).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor


def pack(latents: Tensor) -> Tensor:
    """[n, 8, h, w] -> [n, h w / 4, 32], the order of FluxPipeline."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: Tensor) -> Tensor:
    """[n, side^2, 32] -> [n, 8, 2 side, 2 side]."""
    n, _, d = tokens.shape
    side = math.isqrt(tokens.shape[1])
    return tokens.view(n, side, side, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, d // 4, 2 * side, 2 * side)


def image_ids(side: int = SIDE) -> Tensor:
    """Positions [side^2, 3] of the image tokens."""
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None, :]
    return ids.reshape(-1, 3)


class Prompts:
    """Text features of prompts, each encoded once; the empty prompt is the dropped one."""

    def __init__(self, folder: Path, prompts: list[str]) -> None:
        clip, t5 = (
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        )
        self.index = {prompt: i for i, prompt in enumerate(dict.fromkeys(["", *prompts]))}
        clip_ids, t5_ids = token_ids(clip, t5, list(self.index))
        with torch.no_grad():
            self.pooled = CLIPTextModel.from_pretrained(folder / "text_encoder")(clip_ids).pooler_output
            self.hidden = T5EncoderModel.from_pretrained(folder / "text_encoder_2")(t5_ids).last_hidden_state

    def __call__(self, indices: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the transformer."""
        return {
            "encoder_hidden_states": self.hidden[indices],
            "pooled_projections": self.pooled[indices],
            "txt_ids": torch.zeros(self.hidden.shape[1], 3),
            "img_ids": image_ids(),
        }


@torch.no_grad()
def sample(model: FluxTransformer2DModel, text: dict[str, Tensor], noise: Tensor, steps: int = 20) -> Tensor:
    """Euler flow from noise [n, 16, 32] to packed latents."""
    sigmas = [1 - i / steps for i in range(steps + 1)]
    x = noise
    for sigma, following in itertools.pairwise(sigmas):
        v = model(hidden_states=x, timestep=torch.full((len(x),), sigma), return_dict=False, **text)[0]
        x = x + (following - sigma) * v
    return x


@torch.no_grad()
def to_images(vae: AutoencoderKL, packed: Tensor) -> np.ndarray:
    """uint8 images [n, 64, 64, 3] of packed latents."""
    images = vae.decode(unpack(packed) / vae.config.scaling_factor + vae.config.shift_factor).sample
    return (images.clamp(-1, 1).add(1).mul(127.5).round()).byte().permute(0, 2, 3, 1).numpy()


def accuracy(images: np.ndarray, prompts: list[str]) -> dict[str, float]:
    """Share of images that meet each kind of constraint, and all."""
    from ttsnap.shapes.checker import check

    verdicts = [check(image, parse(prompt)) for image, prompt in zip(images, prompts, strict=True)]
    return {
        kind: float(np.mean([getattr(v, kind) for v in verdicts]))
        for kind in ("count", "colour", "shape", "relation", "all")
    }


def train(rank: int, a: argparse.Namespace) -> None:
    """The loop of one process."""
    torch.manual_seed(rank)
    vae = AutoencoderKL.from_pretrained(a.vae)
    latents, true, loose = dataset(rank, a.images // a.processes, vae, a.out / f"latents{rank}.pt")
    held_out = held_out_prompts()
    text = Prompts(a.text, sorted({*true, *loose, *held_out}))
    indices = [torch.tensor([text.index[p] for p in prompts]) for prompts in (true, loose)]
    torch.manual_seed(0)
    model = build(a.heads)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "blocks" in n and "norm" not in n]
    chosen = {id(p) for p in matrices}
    muon = Muon(matrices)
    adam = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in chosen], lr=a.rate / 2, betas=(0.9, 0.97), weight_decay=0.0
    )
    ema = common.Ema({"model": model}, a.ema)
    step, spent = 0, 0.0
    log = common.Log(a.out) if rank == 0 else None
    if state := common.load(a.out / "checkpoint.pt"):
        model.load_state_dict(state["model"])
        ema.state = state["ema"]
        adam.load_state_dict(state["adam"])
        muon.buffers = state["muon"]
        step, spent = state["step"], state["spent"]
    generator = torch.Generator().manual_seed(1000003 * step + rank)
    last, saved, evaluated = time.time(), time.time(), time.time()
    losses = []
    while spent < a.minutes * 60:
        progress = spent / (a.minutes * 60)
        factor = common.schedule(progress, decay=0.4)
        index = indices[progress >= a.loose]
        for group in adam.param_groups:
            group["lr"] = a.rate / 2 * factor
        rows = torch.randint(len(latents), (a.batch,), generator=generator)
        x0 = latents[rows].float()
        t = torch.sigmoid(torch.randn(a.batch, generator=generator))
        high = torch.rand(a.batch, generator=generator)
        t = torch.where(torch.rand(a.batch, generator=generator) < 0.5, 0.75 + 0.25 * high, t)[:, None, None]
        noise = torch.randn(x0.shape, generator=generator)
        kept = torch.rand(a.batch, generator=generator) >= 0.05
        output = model(
            hidden_states=(1 - t) * x0 + t * noise,
            timestep=t.flatten(),
            return_dict=False,
            **text(torch.where(kept, index[rows], 0)),
        )[0]
        loss = (output - (noise - x0)).square().mean()
        model.zero_grad()
        loss.backward()
        common.average_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(a.rate * factor)
        adam.step()
        step += 1
        ema.update(step)
        losses.append(loss.item())
        now = time.time()
        spent = common.same_on_all(spent + now - last)
        last = now
        if log and step % 50 == 0:
            log(step=step, loss=float(np.mean(losses)), minutes=spent / 60)
            losses = []
        if rank == 0 and now - saved > 90:
            state = {"model": model.state_dict(), "ema": ema.state, "adam": adam.state_dict(), "muon": muon.buffers}
            common.save(state | {"step": step, "spent": spent, "heads": a.heads}, a.out / "checkpoint.pt")
            saved = now
        if log and now - evaluated > a.evaluate * 60:
            evaluate(model, ema, vae, text, held_out[:96], log, a.out / f"ema{step:06d}.pt")
            evaluated = now
    if rank == 0:
        common.save({"model": ema.state["model"], "heads": a.heads}, a.out / "final.pt")


def evaluate(
    model: FluxTransformer2DModel,
    ema: common.Ema,
    vae: AutoencoderKL,
    text: Prompts,
    prompts: list[str],
    log: common.Log,
    path: Path,
) -> None:
    """Accuracy by kind of the averaged weights on held-out prompts; keeps those weights."""
    mine = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(ema.state["model"])
    noise = torch.randn(len(prompts), 16, 32, generator=torch.Generator().manual_seed(1))
    images = to_images(vae, sample(model, text(torch.tensor([text.index[p] for p in prompts])), noise))
    model.load_state_dict(mine)
    common.save({"model": ema.state["model"], "heads": model.config.num_attention_heads}, path)
    log(**accuracy(images, prompts))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae_stage1"))
    parser.add_argument("--text", type=Path, default=Path("runs/text"))
    parser.add_argument("--out", type=Path, default=Path("runs/transformer"))
    parser.add_argument("--minutes", type=float, default=65)
    parser.add_argument("--images", type=int, default=80_000)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128, help="per process")
    parser.add_argument("--rate", type=float, default=3e-3, help="of Muon; AdamW takes half")
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--loose", type=float, default=0.7, help="share of the time after which captions are loose")
    parser.add_argument("--evaluate", type=float, default=5, help="minutes between evaluations")
    parser.add_argument("--processes", type=int, default=2)
    a = parser.parse_args()
    common.launch(train, a.processes, a)


if __name__ == "__main__":
    main()
