"""A batch of candidates by the sampler and by one stock call: what other benchmarks compare."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from ttsnap.live.speed import in_turns, now

PROMPT = "a red circle left of a blue square"


def seconds(work, device) -> float:
    """How long some work takes."""
    start = now(device)
    work()
    return now(device) - start


def stock(sampler, count, **options):
    """Images [count, h, w, 3] of one stock call for so many images, seeds 0, 1, ..."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(count)]
    asked = {"num_images_per_prompt": count, "generator": generators, "output_type": "np"}
    return sampler.pipe(PROMPT, **asked, **sampler.call_options() | options).images


def one_by_one(sampler, count):
    """The same, of a stock call for each."""
    made = []
    for seed in range(count):
        generator = torch.Generator("cpu").manual_seed(seed)
        made.append(sampler.pipe(PROMPT, generator=generator, output_type="np", **sampler.call_options()).images)
    return np.concatenate(made)


def ours(sampler, count):
    """The same, of the sampler: images [count, 3, h, w], nothing remembered of the prompt."""
    sampler.forget_prompts()
    return sampler.look(sampler.advance(sampler.start([PROMPT] * count, list(range(count))), sampler.num_steps))


def difference(mine, theirs) -> tuple[float, float]:
    """Mean and largest difference of images [n, 3, h, w] and [n, h, w, 3], of 255."""
    apart = 255 * np.abs(mine.float().cpu().numpy().transpose(0, 2, 3, 1) - theirs)
    return float(apart.mean()), float(apart.max())


class Idle:
    """While it is entered, the denoiser and the decoder of `shapes` do nothing: they return answers made before."""

    def __init__(self, pipe) -> None:
        self.pipe, self.ready = pipe, {}

    def __enter__(self) -> None:
        def forward(hidden_states, **_):
            return (self._zeros(hidden_states.shape),)

        def decode(latents, **_):
            return (self._zeros((len(latents), 3, 8 * latents.shape[-2], 8 * latents.shape[-1])),)

        self.pipe.transformer.forward, self.pipe.vae.decode = forward, decode

    def __exit__(self, *_) -> None:
        del self.pipe.transformer.forward, self.pipe.vae.decode

    def _zeros(self, shape):
        if shape not in self.ready:
            self.ready[shape] = torch.zeros(shape)
        return self.ready[shape]


def fixed_part(make, most, few, many, repeats):
    """Milliseconds that the sampler adds to one stock call: once per candidate, and per step and candidate.

    Args:
        make: makes a sampler of `shapes` for so many steps.
        most: candidates.
        few: steps of the short run.
        many: of the long one.
        repeats: of each.
    """
    short, long = make(few), make(many)
    with Idle(short.pipe):
        pairs = itertools.product((("ours", ours), ("stock", stock)), (("few", short), ("many", long)))
        works = {(a, b): lambda w=work, s=sampler: w(s, most) for (a, work), (b, sampler) in pairs}
        for work in works.values():
            work()
        least = {name: took.min() for name, took in in_turns(works, short.device, repeats)[0].items()}
    apart = {b: least["ours", b] - least["stock", b] for b in ("few", "many")}
    step = (apart["many"] - apart["few"]) / (many - few) / most
    return 1e3 * (apart["few"] / most - few * step), 1e3 * step
