"""Measure the gates of the embedded model on held-out prompts with the shipped weights.

python -m tools.shapes.evaluate --seeds 16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tools.shapes import common
from tools.shapes.reward import auc
from ttsnap.live.leaderboard import interval
from ttsnap.pipelines.flops import cost_model
from ttsnap.pipelines.outputs import to_uint8
from ttsnap.pipelines.sampler import Sampler
from ttsnap.shapes.checker import check
from ttsnap.shapes.pipeline import OPTIONS, load_pipeline
from ttsnap.shapes.reward import KINDS, load_reward, soft_minimum
from ttsnap.shapes.scenes import OPPOSITE, Spec, held_out_prompts, parse, render_batch, sample_scene


def opposite(prompt: str) -> str:
    """The prompt with its relation reversed."""
    spec = parse(prompt)
    return Spec(spec.things, tuple(OPPOSITE[relation] for relation in spec.relations)).prompt


def half_width(function: Callable[[Any], float], prompts: int) -> float:
    """Half of the 95 % interval of a function of resampled prompts."""
    low, high = interval(function, prompts, times=400)
    return (high - low) / 2


@torch.no_grad()
def measure(seeds: int, most: int | None = None) -> dict[str, object]:
    """All figures: accuracy by kind, reward AUC by kind, best-of-N against the oracle, reconstructions, costs."""
    pipe, reward = load_pipeline(), load_reward()
    sampler = Sampler(pipe, **OPTIONS, max_batch=64)
    prompts = held_out_prompts()[:most]
    rng = np.random.default_rng(3)

    clean = np.concatenate([render_batch([sample_scene(parse(p), rng) for p in prompts]) for _ in range(2)])
    again = pipe.vae.decode(pipe.vae.encode(common.to_tensor(clean)).latent_dist.mean).sample
    rebuilt = to_uint8(again / 2 + 0.5)
    twice = [*prompts, *prompts]

    asked = [p for p in prompts for _ in range(seeds)]
    images, logits, reversed_logits = [], [], []
    for start in range(0, len(asked), 64):
        part = asked[start : start + 64]
        done = sampler.advance(
            sampler.start(part, [*range(start, start + len(part))]),
            OPTIONS["num_inference_steps"],  # no two share a noise
        )
        decoded = sampler.decode(done.x0)  # type: ignore[arg-type]
        images.append(to_uint8(decoded))
        logits.append(reward.logits(decoded, part))
        reversed_logits.append(reward.logits(decoded, [opposite(p) for p in part]))
    verdicts = [check(image, p) for image, p in zip(np.concatenate(images), asked, strict=True)]
    table = np.array([[getattr(v, kind) for kind in KINDS] for v in verdicts])
    values = torch.cat(logits)
    # The model hardly ever errs on relations, so each image is also judged against the opposite relation.
    relation = [check(image, opposite(p)).relation for image, p in zip(np.concatenate(images), asked, strict=True)]
    both = torch.cat([values, *reversed_logits])[:, KINDS.index("relation")].numpy()
    relation_auc = auc(both, np.concatenate([table[:, KINDS.index("relation")], np.asarray(relation)]))
    minimum = soft_minimum(values).numpy()
    right = table.all(1).reshape(-1, seeds)
    chosen = minimum.reshape(-1, seeds).argmax(1)
    model = cost_model(sampler, {"shapes": reward}, prompts[0])
    best, by_prompt = right[np.arange(len(right)), chosen], table.reshape(len(prompts), seeds, -1)
    scores = {kind: (values[:, i].numpy(), table[:, i]) for i, kind in enumerate(KINDS)}
    scores |= {"all": (minimum, np.asarray(table.all(1)))}

    def share_of(place: int) -> Callable[[Any], float]:
        return lambda who: float(by_prompt[who, :, place].mean())

    def auc_of(kind: str) -> Callable[[Any], float]:
        score, truth = (x.reshape(len(prompts), seeds) for x in scores[kind])
        return lambda who: auc(score[who].ravel(), truth[who].ravel())

    return {
        "prompts": len(prompts),
        "seeds": seeds,
        "half_width": {
            "one_sample": {kind: half_width(share_of(i), len(prompts)) for i, kind in enumerate(KINDS)}
            | {"all": half_width(lambda who: float(right[who].mean()), len(prompts))},
            "reward_auc": {kind: half_width(auc_of(kind), len(prompts)) for kind in scores if kind != "relation"},
            f"best_of_{seeds}": half_width(lambda who: float(best[who].mean()), len(prompts)),
        },
        "one_sample": {kind: float(table[:, i].mean()) for i, kind in enumerate(KINDS)} | {"all": float(right.mean())},
        "reward_auc": {kind: auc(values[:, i].numpy(), table[:, i]) for i, kind in enumerate(KINDS)}
        | {"relation": relation_auc, "all": auc(minimum, np.asarray(table.all(1)))},
        f"best_of_{seeds}": float(best.mean()),
        "oracle": float(right.any(1).mean()),
        "reconstructions": float(np.mean([check(image, p).all for image, p in zip(rebuilt, twice, strict=True)])),
        "clean_renders": float(np.mean([check(image, p).all for image, p in zip(clean, twice, strict=True)])),
        "mflop": {
            "call": model.call_tflop * 1e6,
            "decode": model.decode_tflop * 1e6,
            "look": model.look_tflop * 1e6,
            "prompt": model.prompt_tflop * 1e6,
        },
    }


def main() -> None:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=None)
    a = parser.parse_args()
    print(json.dumps(measure(a.seeds, a.prompts), indent=1))


if __name__ == "__main__":
    main()
