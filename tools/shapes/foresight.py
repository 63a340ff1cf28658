"""The noise-aware reward `shapes-aware`: a student of the clean reward's eyes, then both against finished images.

    python -m tools.shapes.foresight --trajectories 20000 --out src/ttsnap/shapes/weights/foresight

Trajectories of half the steps serve as well as long ones, since the network knows noise levels and not steps: they give
twice as many finished images for the same time. Training prompts from 800 on are kept for tuning and for checks.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ttsnap.core.grid import IntArray
from ttsnap.live.session import load_sampler
from ttsnap.pipelines.features import Place, tap
from ttsnap.pipelines.sampler import Sampler
from ttsnap.rewards.feature_head import stack_words
from ttsnap.shapes import foresight
from ttsnap.shapes.reward import load_reward, soft_minimum
from ttsnap.shapes.scenes import COLOURS, SHAPES, train_prompts
from ttsnap.training.heads import Trails

PER_PROMPT, PROMPTS, SINGLES, TEMPERATURE, AUXILIARY = 8, 800, 0.05, 0.5, 0.3


def gather(
    sampler: Sampler,
    judge: Callable[[Tensor, Sequence[str]], Tensor],
    places: Sequence[Place],
    prompts: Sequence[str],
    seeds: IntArray,
    *,
    words: int = 64,
    keep_latents: bool = False,
    on_trajectories: Callable[[int], None] | None = None,
) -> Trails:
    """Run candidates to the end, keep the features of every call but the last, and judge the finished images.

    Args:
        sampler: drives the model; its steps decide the noise levels.
        judge: images [n, 3, h, w] and prompts -> targets [n, outputs], the reward first.
        places: where to listen; what is kept of them is concatenated.
        prompts: of each group [groups]; a prompt may occur in several.
        seeds: [groups, size], all different.
        words: most words of a prompt to keep.
        keep_latents: keep the x0 estimate of every call, too.
        on_trajectories: called with the number of trajectories just done.
    """
    before, sampler.tap = sampler.tap, tap(sampler, places)
    size = seeds.shape[1]
    together = max(1, sampler.max_batch // size)
    states: dict[str, Tensor] = {}
    cells, latents, targets = [], [], []
    try:
        for start in range(0, len(prompts), together):
            block = seeds[start : start + together]
            texts = [prompt for prompt in prompts[start : start + together] for _ in range(size)]
            state = sampler.start(texts, block.ravel().tolist())
            heard, estimates = [], []
            for call in range(1, sampler.num_steps):
                state = sampler.advance(state, call)
                found = sampler.features(state)
                assert found.latents is not None
                heard.append(found.cells.half().cpu())
                estimates += [found.latents.half().cpu()] if keep_latents else []
            state = sampler.advance(state, sampler.num_steps)
            states |= {text: found[:words].cpu() for text, found in zip(texts, sampler.tap.words(texts), strict=True)}
            with torch.no_grad():
                said = judge(sampler.look(state), texts).float().cpu()
            shape = block.shape
            cells.append(torch.stack(heard, 1).reshape(*shape, len(heard), *heard[0].shape[1:]))
            if keep_latents:
                latents.append(torch.stack(estimates, 1).reshape(*shape, len(estimates), *estimates[0].shape[1:]))
            targets.append(said.reshape(*shape, -1))
            sampler.forget_prompts()
            if on_trajectories:
                on_trajectories(len(texts))
    finally:
        sampler.tap = before
    unique = tuple(dict.fromkeys(prompts))
    stacked, mask = stack_words([states[prompt] for prompt in unique], words)
    index = {prompt: number for number, prompt in enumerate(unique)}
    return Trails(
        unique,
        stacked,
        mask,
        np.array([index[prompt] for prompt in prompts]),
        torch.cat(cells),
        torch.cat(targets),
        np.array(sampler.sigmas[:-1]),
        torch.cat(latents) if keep_latents else None,
    )


def trajectories(count: int, *, steps: int = 10, seed: int = 70_000_000, **options: Any) -> Trails:
    """Groups of candidates of random training prompts, with what the clean reward said of the finished images.

    Args:
        count: trajectories.
        steps: denoiser calls of each.
        seed: of prompts, and first of the candidates.
        **options: of `gather`.
    """
    rng = np.random.default_rng(seed)
    prompts, singles = train_prompts()[:PROMPTS], [f"a {c} {s}" for c, s in product(COLOURS, SHAPES)]
    asked = []
    for _ in range(-(-count // PER_PROMPT)):
        pool = singles if rng.random() < SINGLES else prompts
        asked.append(pool[int(rng.integers(len(pool)))])
    sampler, reward = load_sampler("shapes", num_inference_steps=steps, max_batch=64), load_reward()
    seeds = seed + np.arange(len(asked) * PER_PROMPT).reshape(-1, PER_PROMPT)

    def judge(images: Tensor, texts: Any) -> Tensor:
        logits = reward.logits(images, texts)
        return torch.cat([soft_minimum(logits)[:, None], logits], dim=1)

    return gather(sampler, judge, [foresight.PLACE], asked, seeds, words=1, keep_latents=True, **options)


def distil(
    model: foresight.Foresight,
    trails: Trails,
    *,
    updates: int = 1200,
    images: int = 12800,
    batch: int = 128,
    rate: float = 3e-3,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> None:
    """Teach the student's convolutions to see in x0 latents what the reward's stem sees in the decoded image."""
    sampler, network = load_sampler("shapes", max_batch=64), load_reward().network
    assert trails.latents is not None
    flat, calls = trails.latents.flatten(0, 2), len(trails.sigmas)
    chosen = torch.from_numpy(np.random.default_rng(seed).integers(len(flat), size=images))
    latents, sigma = flat[chosen], torch.from_numpy(trails.sigmas).float()[chosen % calls]
    with torch.no_grad():
        seen = torch.cat([network.encode_image(sampler.decode(part.float())).half() for part in latents.split(64)])
    scale = seen.float().std((0, 1))
    parts = (model.student.noise, model.student.stem, model.student.convs, model.student.near)
    optimiser = torch.optim.AdamW([p for part in parts for p in part.parameters()], rate, weight_decay=0.01)
    torch.manual_seed(seed)
    for update in range(updates):
        set_rate(optimiser, rate, update, updates)
        rows = torch.randint(images, (batch,))
        found = model.student(None, latents[rows].float(), sigma[rows])
        loss = (((found - seen[rows].float()) / scale) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (update + 1) % max(1, updates // 6) == 0:
            tell(f"distil {update + 1}: {loss.item():.3f}")


def train(
    model: foresight.Foresight,
    trails: Trails,
    *,
    updates: int = 1200,
    batch: int = 256,
    rate: float = 1e-3,
    lowest: float = 0.25,
    average: float = 0.998,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> foresight.Foresight:
    """Foretell the clean reward of the finished image at all noise levels at once; the averaged model.

    Squared error of the reward, a little of the four logits, and a Bradley-Terry loss over all pairs of a group.
    """
    assert trails.latents is not None
    targets = trails.targets
    mean, std = targets.flatten(0, 1).mean(0), targets.flatten(0, 1).std(0)
    calls = np.flatnonzero(trails.sigmas >= lowest)
    kept = foresight.stored(model)
    student = list(model.student.parameters())
    judge = [p for name, p in model.named_parameters() if name in kept and not name.startswith("student.")]
    optimiser = torch.optim.AdamW(
        [{"params": student, "share": 1.0}, {"params": judge, "share": 0.5}], rate, weight_decay=0.05, betas=(0.9, 0.98)
    )
    averaged = copy.deepcopy(model)
    rng, size = np.random.default_rng(seed), targets.shape[1]
    for update in range(updates):
        set_rate(optimiser, rate, update, updates)
        groups = rng.integers(len(trails), size=max(1, batch // size))
        levels = rng.choice(calls, size=len(groups))
        cells, latents = (x[groups, :, levels].flatten(0, 1).float() for x in (trails.cells, trails.latents))
        texts = [trails.prompts[p] for p in trails.prompt[groups] for _ in range(size)]
        sigma = torch.from_numpy(trails.sigmas[levels].repeat(size)).float().to(cells.device)
        logits = model.logits(cells, latents, texts, sigma)
        wanted = ((targets[groups] - mean) / std).flatten(0, 1)
        found = (torch.cat([soft_minimum(logits)[:, None], logits], dim=1) - mean) / std
        reward, aim = found[:, 0], wanted[:, 0]
        pairs = [(x.view(-1, size, 1) - x.view(-1, 1, size)) / TEMPERATURE for x in (reward, aim)]
        ranking = F.binary_cross_entropy_with_logits(pairs[0], pairs[1].sigmoid())
        mse = F.mse_loss(reward, aim)
        optimiser.zero_grad()
        (mse + AUXILIARY * F.mse_loss(found[:, 1:], wanted[:, 1:]) + ranking).backward()
        torch.nn.utils.clip_grad_norm_(student + judge, 1.0)
        optimiser.step()
        decay = min(average, (update + 1) / (update + 10))
        with torch.no_grad():
            for mine, new in zip(averaged.parameters(), model.parameters(), strict=True):
                mine.lerp_(new, 1 - decay)
        if (update + 1) % max(1, updates // 10) == 0:
            tell(f"train {update + 1}: squared error {mse.item():.3f}, ranking {ranking.item():.3f}")
    return averaged


def set_rate(optimiser: torch.optim.Optimizer, rate: float, update: int, updates: int) -> None:
    """A rise over the first twentieth, then a cosine to zero."""
    now = rate * min(1.0, (update + 1) / (0.05 * updates)) * 0.5 * (1 + math.cos(math.pi * update / updates))
    for group in optimiser.param_groups:
        group["lr"] = now * group.get("share", 1.0)


def main() -> None:
    """Parse, make trajectories, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=20000)
    parser.add_argument("--distil", type=int, default=1200, help="updates of the first stage")
    parser.add_argument("--updates", type=int, default=1200, help="updates of the second stage")
    parser.add_argument("--lowest", type=float, default=0.25, help="lowest noise level to train")
    parser.add_argument("--serve", type=float, default=0.75, help="lowest noise level to serve; clean reward below")
    parser.add_argument("--out", type=Path, default=Path("runs/foresight"))
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    done = 0

    def count(some: int) -> None:
        nonlocal done
        done += some
        if done // 1024 > (done - some) // 1024:
            print(f"{done} of {a.trajectories} trajectories", flush=True)

    trails = trajectories(a.trajectories, on_trajectories=count)
    model = foresight.begin()
    distil(model, trails, updates=a.distil, tell=print)
    model = train(model, trails, updates=a.updates, lowest=a.lowest, tell=print)
    notes = {name: getattr(a, name) for name in ("trajectories", "distil", "updates", "lowest")}
    foresight.save(model, a.out, sigma=a.serve, trained=notes)


if __name__ == "__main__":
    main()
