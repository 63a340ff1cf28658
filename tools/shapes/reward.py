"""Train the clean reward of the embedded world.

    python -m tools.shapes.reward --vae runs/vae/vae_stage1 --out runs/reward --minutes 20

Images: clean renders, VAE reconstructions, and malformed images (decoded mixtures of latents, noised latents, scenes
with things missing, extra or elsewhere, blurred, bled and faded ones). Each is paired with its own prompt or with one
that differs in one respect; the checker labels the pairs. The scalar label alone teaches nothing: words are told which
of them are met and where their things lie, grid cells which colour and shape they show. Resumes after a kill.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from tools.shapes import common
from tools.shapes.transformer import encode
from tools.shapes.vae import any_scene
from ttsnap.shapes.checker import Found, detect, judge
from ttsnap.shapes.reward import GRID, KINDS, LENGTH, RewardNetwork, soft_minimum
from ttsnap.shapes.scenes import COLOURS, RELATIONS, SHAPES, Spec, is_held_out, render_batch, sample_scene, sample_spec

_COLOURS = tuple(COLOURS)


@torch.no_grad()
def pool(vae: AutoencoderKL, count: int, rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[Spec]]:
    """Images [count, 64, 64, 3] with the Spec each was meant to show."""
    images, specs = [], []
    for start in range(0, count, 256):
        batch = [sample_spec(rng) for _ in range(256)]
        scenes = [sample_scene(spec, rng) if rng.random() < 0.75 else any_scene(rng) for spec in batch]
        clean = render_batch(scenes)
        kind = (start // 256) % 4
        if kind == 0:
            made = clean
        else:
            latents = encode(vae, common.to_tensor(clean))
            other = latents[torch.randperm(256)]
            if kind == 2:  # mixtures, everywhere or in a part of the image
                mask = F.interpolate(torch.rand(256, 1, 2, 2), (8, 8), mode="bilinear") * 1.3 - 0.15
                latents = torch.lerp(latents, other, mask.clamp(0, 1))
            if kind >= 2:
                latents = latents + torch.rand(256, 1, 1, 1) ** 2 * 0.8 * torch.randn(latents.shape)
            decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
            made = (decoded.clamp(-1, 1).add(1).mul(127.5).round()).byte().permute(0, 2, 3, 1).numpy()
            if kind == 3:
                made = np.stack([_malform(image, rng) for image in made])
        images.append(made)
        specs += batch
    return np.concatenate(images)[:count], specs[:count]


def _malform(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Blur, fade, bleed or mix the colours of an image."""
    x = image.astype(np.float32)
    choice = rng.integers(4)
    if choice == 0:
        x = ndimage.gaussian_filter(x, (*[rng.uniform(0.3, 2.0)] * 2, 0))
    elif choice == 1:
        x = 42 + (x - 42) * rng.uniform(0.3, 1.0)
    elif choice == 2:  # colours bleed, shapes stay
        grey = x.max(-1, keepdims=True)
        x = grey * ndimage.gaussian_filter(x / np.maximum(grey, 1), (6, 6, 0)) / 0.8
    else:
        x = x[..., rng.permutation(3)] * (0.5 * rng.random()) + x * 0.7
    return np.clip(np.round(x), 0, 255).astype(np.uint8)


def variation(spec: Spec, rng: np.random.Generator) -> Spec:
    """The Spec itself, or one that differs in one respect; never a held-out one."""
    while True:
        other = _vary(spec, rng)
        if not is_held_out(other) and len(set(other.things)) == len(other.things):
            return other


def _vary(spec: Spec, rng: np.random.Generator) -> Spec:
    things, relation = list(spec.things), next(iter(spec.relations), None)
    which = int(rng.integers(len(things)))
    choice = rng.random()
    if choice < 0.35:
        return spec
    if choice < 0.5:
        things[which] = things[which]._replace(colour=_COLOURS[rng.integers(6)])
    elif choice < 0.65:
        things[which] = things[which]._replace(shape=SHAPES[rng.integers(3)])
    elif choice < 0.75 and relation:
        return Spec(tuple(things[::-1]), spec.relations)
    elif choice < 0.85 and relation:
        relation = RELATIONS[rng.integers(4)]
    elif choice < 0.93:
        if relation:
            return Spec((things[which],))
        return Spec((things[0], sample_spec(rng, single=1).things[0]), (RELATIONS[rng.integers(4)],))
    else:
        return sample_spec(rng)
    return Spec(tuple(things), (relation,) if relation else ())


def targets(found: list[Found], spec: Spec) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Labels of a pair: kinds [4], words met [12] (NaN: not asked), cell of each noun's thing [12]."""
    verdict = judge(found, spec)
    kinds = np.asarray([getattr(verdict, kind) for kind in KINDS], dtype=np.float32)
    met = np.full(LENGTH, np.nan, dtype=np.float32)
    cell = np.full(LENGTH, -100, dtype=np.int64)
    start = 0
    for colour, shape, _ in spec.things:
        exact = [f for f in found if (f.colour, f.shape) == (colour, shape)]
        near = exact or [f for f in found if f.colour == colour] or [f for f in found if f.shape == shape]
        met[start + 1] = any(f.colour == colour for f in found)
        met[start + 2] = bool(exact)
        if near:
            index = int(np.clip(near[0].y // 8, 0, 7)) * GRID + int(np.clip(near[0].x // 8, 0, 7))
            cell[start + 1 : start + 3] = index
        start += 3
        if spec.relations and start == 3:
            met[3] = verdict.relation
            start += len(spec.relations[0].split())
    return kinds, met, cell


def cell_labels(found: list[Found], grid: int = GRID) -> NDArray[np.int64]:
    """Colour (0 none, 1..6) and shape (0 none, 1..3) of each grid cell [grid^2, 2]; -100 where not to be told."""
    label = np.zeros((grid, grid, 2), dtype=np.int64)
    centre = np.arange(grid) * 8 + 4
    for f in found:
        inside = np.hypot(centre[None, :] - f.x, centre[:, None] - f.y) < max(6.0, np.sqrt(f.area) * 0.55)
        label[inside, 0] = _COLOURS.index(f.colour) + 1 if f.colour else -100
        label[inside, 1] = SHAPES.index(f.shape) + 1 if f.shape else -100
    return label.reshape(-1, 2)


def loss_of(
    network: RewardNetwork, images: Tensor, prompts: list[str] | Tensor, labels: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The sum of all losses, and the logits; prompts may be word ids."""
    kinds, met, cell, cells = labels
    words = prompts if isinstance(prompts, Tensor) else network.tokenize(prompts)
    output = network(images, *network.encode_text(words))
    loss = F.binary_cross_entropy_with_logits(output["logits"], kinds * 0.98 + 0.01)
    everything = kinds.amin(1)
    # The soft minimum is what ranks, so it must be right by itself.
    loss = loss + 0.5 * F.binary_cross_entropy_with_logits(soft_minimum(output["logits"]), everything * 0.98 + 0.01)
    asked = ~met.isnan()
    said = network.word_met(output["words"][:, 1:]).squeeze(-1)
    loss = loss + 0.5 * F.binary_cross_entropy_with_logits(said[asked], met[asked])
    loss = loss + 0.2 * F.cross_entropy(output["scores"][:, 1:].flatten(0, 1), cell.flatten())
    weight = torch.ones(7, device=images.device)
    weight[0] = 0.15
    loss = loss + 0.5 * F.cross_entropy(
        network.cell_colour(output["grid"]).flatten(0, 1), cells[..., 0].flatten(), weight
    )
    loss = loss + 0.5 * F.cross_entropy(
        network.cell_shape(output["grid"]).flatten(0, 1), cells[..., 1].flatten(), weight[:4]
    )
    return loss, output["logits"]


def auc(values: NDArray[np.float64], truth: NDArray[np.bool_]) -> float:
    """Area under the ROC curve; NaN where only one class occurs."""
    if truth.all() or not truth.any():
        return float("nan")
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable") + 1
    positives = int(truth.sum())
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * (len(truth) - positives)))


def train(rank: int, a: argparse.Namespace) -> None:
    """The loop."""
    torch.manual_seed(0)
    log = common.Log(a.out)
    state = common.load(a.out / "pool.pt")
    if state is None:
        images, specs = pool(AutoencoderKL.from_pretrained(a.vae), a.images, np.random.default_rng(21))
        state = {"images": torch.from_numpy(images), "prompts": [spec.prompt for spec in specs]}
        common.save(state, a.out / "pool.pt")
    from ttsnap.shapes.scenes import parse

    images, specs = state["images"].numpy(), [parse(p) for p in state["prompts"]]
    for path in a.extra:  # more images with the prompts they were made for
        more = common.load(path)
        assert more is not None
        images = np.concatenate([images, *[more["images"].numpy()] * a.repeat])
        specs += [parse(p) for p in more["prompts"]] * a.repeat
    found = [detect(image) for image in images]
    cells = np.stack([cell_labels(f) for f in found])
    log(images=len(images))
    network = RewardNetwork()
    optimiser = torch.optim.AdamW(network.parameters(), lr=a.rate, betas=(0.9, 0.98), weight_decay=0.02)
    ema = common.Ema({"network": network}, 0.998)
    step, spent = 0, 0.0
    if saved_state := common.load(a.out / "checkpoint.pt"):
        network.load_state_dict(saved_state["network"])
        ema.state = saved_state["ema"]
        optimiser.load_state_dict(saved_state["optimiser"])
        step, spent = saved_state["step"], saved_state["spent"]
    rng = np.random.default_rng([5, step])
    last = saved = time.time()
    seen: list[tuple[Tensor, Tensor]] = []
    while spent < a.minutes * 60:
        for group in optimiser.param_groups:
            group["lr"] = a.rate * common.schedule(spent / (a.minutes * 60), decay=0.6)
        rows = rng.integers(len(images), size=a.batch)
        asked = [variation(specs[i], rng) if not is_held_out(specs[i]) else specs[i] for i in rows]
        kinds, met, cell = (
            np.stack(x) for x in zip(*(targets(found[i], s) for i, s in zip(rows, asked, strict=True)), strict=True)
        )
        batch = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 255
        batch = batch * (1 + 0.05 * torch.randn(a.batch, 1, 1, 1)) + 0.01 * torch.randn(batch.shape)
        labels = tuple(torch.from_numpy(x) for x in (kinds, met, cell, cells[rows]))
        loss, logits = loss_of(network, batch, [s.prompt for s in asked], labels)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        ema.update(step)
        seen.append((logits.detach(), labels[0]))
        now = time.time()
        spent, last = spent + now - last, now
        if step % 100 == 0:
            values, truth = (torch.cat(x).numpy() for x in zip(*seen[-20:], strict=True))
            by_kind = {kind: auc(values[:, i], truth[:, i] > 0.5) for i, kind in enumerate(KINDS)}
            minimum = soft_minimum(torch.from_numpy(values)).numpy()
            log(step=step, loss=loss.item(), all=auc(minimum, truth.min(1) > 0.5), **by_kind, minutes=spent / 60)
            seen = []
        if now - saved > 60:
            checkpoint = {"network": network.state_dict(), "ema": ema.state, "optimiser": optimiser.state_dict()}
            common.save(checkpoint | {"step": step, "spent": spent}, a.out / "checkpoint.pt")
            saved = now
    network.load_state_dict(ema.state["network"])
    export(network, a.out / "reward")


def export(network: RewardNetwork, folder: Path) -> None:
    """Write the weights in fp16 with their configuration."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half().contiguous() for key, value in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(network.config) + "\n")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae_stage1"))
    parser.add_argument("--out", type=Path, default=Path("runs/reward"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--images", type=int, default=24_576)
    parser.add_argument("--extra", type=Path, nargs="*", default=[])
    parser.add_argument("--repeat", type=int, default=1, help="weight of the extra images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    a = parser.parse_args()
    common.launch(train, 1, a)


if __name__ == "__main__":
    main()
