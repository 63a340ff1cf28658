"""Jobs on the toy sampler, made so that Ray workers can load them too, and the ways in which they go wrong."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import torch

from tests.pipelines.toy import ToyReward, toy_sampler
from ttsnap.cluster.generate import Generate
from ttsnap.cluster.label import Label
from ttsnap.cluster.record import Record
from ttsnap.core.cost import CostModel
from ttsnap.live.session import Session
from ttsnap.policies import SuccessiveHalving
from ttsnap.recordings import Recording
from ttsnap.recordings.image_tree import ImageTree

PROMPTS = [f"prompt {number}" for number in range(24)]
PER_PROMPT = 4
BATCH = 8
HALVING = SuccessiveHalving((1, 2), keep=(0.5, 0.5))


def sampler_of(pause=0.0, full_once=None, refuses=None):
    """Takes a little real time per call; told to, it runs out of memory once, or refuses a prompt."""
    sampler = toy_sampler(num_steps=4, max_batch=BATCH)
    pipe = sampler.pipe
    encode, forward = pipe.encode_prompt, pipe.transformer.forward

    def refusing(prompt):
        if prompt == refuses:
            raise RuntimeError("I cannot read this")
        return encode(prompt)

    def slow(latents, *rest):
        time.sleep(pause)
        if full_once and len(latents) > 2 and not Path(full_once).exists():
            Path(full_once).touch()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(latents, *rest)

    pipe.encode_prompt, pipe.transformer.forward = refusing, slow
    return sampler


class Reward(ToyReward):
    """Raises, is NaN, or kills its process where `prompt` is concerned."""

    def __init__(self, how=None, prompt=PROMPTS[5]):
        super().__init__()
        self.how, self.prompt = how, prompt

    def __call__(self, images, prompts, *, sigma):
        mine = torch.tensor([prompt == self.prompt for prompt in prompts])
        if mine.any() and self.how == "raises":
            raise RuntimeError("I do not like this one")
        if mine.any() and self.how == "kills":
            os.kill(os.getpid(), signal.SIGKILL)
        values = super().__call__(images, prompts, sigma=sigma)
        return torch.where(mine, torch.nan, values) if self.how == "nan" else values


def rewards(how, device):
    return {"bright": Reward(how)}


def cpu():
    return torch.device("cpu")


def nothing(sampler):
    return {"model": "toy"}


def images(out, prompts=PROMPTS, **sampler):
    return Record(partial(sampler_of, **sampler), None, nothing, prompts, range(len(prompts)), PER_PROMPT, out)


def values(out, how=None, prompts=PROMPTS, **sampler):
    load = partial(rewards, how)
    return Record(partial(sampler_of, **sampler), load, nothing, prompts, range(len(prompts)), PER_PROMPT, out)


def labels(tree, out, how=None):
    return Label(ImageTree.open(tree), partial(rewards, how), cpu, out, batch=BATCH)


def searcher(how, policy, sampler):
    return Session(sampler_of(**sampler), rewards(how, "cpu"), policy, PER_PROMPT, CostModel("toy", 1.0, 1.0, 1.0))


def search(out, how=None, prompts=PROMPTS, policy=HALVING, **sampler):
    return Generate(partial(searcher, how, policy, sampler), prompts, out, {}, seed=7, board=False)


def files(root):
    """Everything that is stored, but for the clock's times and the commit that made it."""
    import json

    found = {}
    for path in sorted(Path(root).rglob("*")):
        if path.is_file() and path.name != "failures.json":
            data = path.read_bytes()
            if path.name == "result.json":
                data = json.loads(data)
                data["cost"].pop("seconds")
                data["best_of_n_at_this_cost"]["cost"].pop("seconds")
            if path.name == "manifest.json":
                data = json.loads(data)
                data.pop("versions")
            found[str(path.relative_to(root))] = data
    return found


def clean(out):
    return Recording(out).clean
