"""Counts the floating-point operations of one call, one decode, one look and one encoded prompt.

Attention, matrix products and convolutions count, two operations per multiply-add, the same on every device. What the
model's parts take is counted in the first call that is made of a pipeline (`ttsnap.pipelines.probe`). A reward can be
any callable, of which nothing but its name is known: its look is counted on one image each time a search is prepared,
twice at the same prompt; one that is a module on a copy without data. What only the first of the two takes is what it
keeps of the prompt.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ttsnap.core.cost import CostModel, LookCost, TextCost
from ttsnap.pipelines.counting import Unmultiplied, count_tflop, some_pictures
from ttsnap.pipelines.patience import Timed, in_time
from ttsnap.pipelines.sampler import Sampler
from ttsnap.pipelines.views import reads_features

_numbers = itertools.count(1)


class LookCount(NamedTuple):
    """TFLOP of one look by a reward, and of what it reads of a prompt once and keeps."""

    look: float
    text: float

    def __add__(self, other: Any) -> LookCount:
        """Two rewards together."""
        return LookCount(self.look + other.look, self.text + other.text)


def cost_model(sampler: Sampler, rewards: Mapping[str, Any], prompt: str = "a") -> CostModel:
    """The cost model of a sampler with these rewards.

    The negative prompt of classifier-free guidance is charged to each prompt, so that a prompt costs the same alone and
    in a block.

    Args:
        sampler: its first call was counted.
        rewards: counted on one image.
        prompt: what the rewards are asked about.
    """
    call, decode, prompt_tflop = sampler.counted()
    look, text = count_looks(rewards, some_pictures(1, sampler.height, sampler.width, sampler.device), prompt)
    look *= max(1, len(sampler.look_frames))
    name = f"{type(sampler.pipe).__name__} {sampler.width}x{sampler.height}"
    early = _early(sampler, rewards, prompt, decode)
    texts = count_texts(rewards, sampler.sigmas, sampler.device, sampler.height, sampler.width, prompt)
    prompt_tflop += text
    finished = decode + sampler.check_tflop
    model = CostModel(name, call, finished, look, prompt_tflop, max_batch=sampler.max_batch, early=early, texts=texts)
    return replace(model, shares=sampler.cache.shares, drafts=sampler.cache.drafts) if sampler.cache else model


def _early(sampler: Sampler, rewards: Mapping[str, Any], prompt: str, decode: float) -> tuple[LookCost, ...]:
    """The cost of looks that do without what finished images go through, or with other judges than these have."""
    kinds: list[tuple[Any, tuple[bool, ...]]] = []
    looks: list[LookCost] = []
    for step in range(1, sampler.num_steps):
        reading = tuple(reads_features(reward, sampler.sigmas[step - 1]) for reward in rewards.values())
        kind = (sampler.preview_at(step), reading)
        if kind[0] is None and not any(reading) and not sampler.check_tflop:
            break
        if not kinds or kinds[-1] != kind:
            kinds.append(kind)
            looks.append(_look(sampler, rewards, prompt, step, decode))
        looks[-1] = replace(looks[-1], until=step)
    return tuple(looks)


def _look(sampler: Sampler, rewards: Mapping[str, Any], prompt: str, step: int, decode: float) -> LookCost:
    """The cost of a look after `step` calls; for a preview one candidate is really looked at."""
    sigma, preview = sampler.sigmas[step - 1], sampler.preview_at(step)
    readers = {name: reward for name, reward in rewards.items() if reads_features(reward, sigma)}
    others = {name: reward for name, reward in rewards.items() if name not in readers}
    judge = sum(count_features(reward, prompt, sampler.device).look for reward in readers.values())
    if readers and not others:
        return LookCost("features", step, 0.0, judge)
    picture, example = decode, some_pictures(1, sampler.height, sampler.width, sampler.device)
    if preview:
        made: list[torch.Tensor] = []
        latents = sampler.spatial(torch.zeros(sampler.probe.sample, device=sampler.device))
        picture = count_tflop(lambda: made.append(preview(sampler, latents)))
        height, width = made[0].shape[-2:]
        example = some_pictures(1, height, width, sampler.device)
    judge += count_looks(others, example, prompt).look
    return LookCost(preview.name if preview else "full", step, picture, judge)


def count_texts(
    rewards: Mapping[str, Any], sigmas: Sequence[float], device: Any, height: int, width: int, prompt: str = "a"
) -> tuple[TextCost, ...]:
    """What looks at x0 estimates read of a prompt beside what looks at finished images read.

    Args:
        rewards: those with noise-aware weights say which reading a look needs (`reads`).
        sigmas: noise level of the x0 estimate after each call.
        device: where the rewards take their images.
        height: of an image.
        width: of an image.
        prompt: what the rewards are asked about.
    """
    found = []
    for reward in rewards.values():
        counted: dict[bool, float] = {}  # all levels are of one size
        steps = range(1, len(sigmas)) if hasattr(reward, "reads") else ()
        for own, group in itertools.groupby(steps, lambda step, reward=reward: reward.reads(sigmas[step - 1])):
            served = list(group)
            if own is None:
                continue
            features = reads_features(reward, sigmas[served[0] - 1])
            if features not in counted:
                look = (reward, prompt, device) if features else (reward, device, height, width, prompt)
                counted[features] = (count_features if features else count_look)(*look).text
            if counted[features]:
                found.append(TextCost(served[0], served[-1], counted[features]))
    return tuple(found)


def count_features(reward: Any, prompt: str, device: Any) -> LookCount:
    """TFLOP of one look by a reward that reads features."""
    nothing = reward.blank(device)
    return _twice(lambda text: reward.early(nothing, [text], sigma=1.0), prompt)


def count_looks(rewards: Mapping[str, Any], images: torch.Tensor, prompt: str) -> LookCount:
    """TFLOP of one look by all rewards at `images` [1, 3, h, w], and of what they keep of a prompt."""
    height, width = images.shape[-2:]
    counts = (count_look(reward, images.device, height, width, prompt) for reward in rewards.values())
    return sum(counts, LookCount(0.0, 0.0))


def count_look(reward: Any, device: Any, height: int, width: int, prompt: str = "a") -> LookCount:
    """TFLOP of one look by a reward at one image, and of what it keeps of a prompt, which belongs to no look.

    A reward that is a module, or has one as `reward`, `clean` or `judge`, is counted on a copy without data, or, where
    it asks for values, with none of its products computed; one that says its own `tflop` (and `text_tflop`, if it keeps
    anything) is not called. One that judges certain prompts only names an `example` of them.
    """
    own = reward.reward if isinstance(reward, Timed) else reward
    parts = [own, *(getattr(own, name, None) for name in ("reward", "clean", "judge"))]
    prompt = next((part.example for part in parts if hasattr(part, "example")), prompt)
    for part in parts:
        if (told := getattr(part, "tflop", None)) is not None:
            return LookCount(float(told), float(getattr(part, "text_tflop", 0.0)))
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = next((part for part in parts if isinstance(part, torch.nn.Module)), None)
    if isinstance(module, torch.nn.Module):
        try:
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            twin = _without_data(module, fake)
            with fake:
                return _count_look(twin, torch.empty(1, 3, height, width, device=device), prompt)
        except Exception:  # control flow on values
            pass
        try:
            twin = copy.deepcopy(module, {id(t): t for t in [*module.parameters(), *module.buffers()]})
            with Unmultiplied():  # type: ignore[no-untyped-call]
                return _count_look(twin, some_pictures(1, height, width, device), prompt)
        except Exception:  # its own kernels: run it for real
            pass
    return in_time(reward, 1, lambda: _count_look(reward, some_pictures(1, height, width, device), prompt))


def _count_look(reward: Any, images: torch.Tensor, prompt: str) -> LookCount:
    return _twice(lambda text: reward(images, [text], sigma=0.0), prompt)


def _twice(look: Callable[[str], Any], prompt: str) -> LookCount:
    """Count a look at a prompt that cannot have been seen before, and once more."""
    with torch.no_grad():
        look(prompt)  # whatever is done only once
    new = f"{prompt} {next(_numbers)}"
    try:
        with warnings.catch_warnings():  # the prompt is made up: that it is cut is of no interest
            warnings.simplefilter("ignore")
            first = count_tflop(lambda: look(new))
            second = count_tflop(lambda: look(new))
    except Exception:  # a reward of one's own that knows certain prompts only
        first = second = count_tflop(lambda: look(prompt))
    return LookCount(second, max(0.0, first - second))


def _without_data(model: torch.nn.Module, fake: Any) -> torch.nn.Module:
    """A copy of a model whose weights have shapes and dtypes but no data."""
    known: dict[int, Any] = {id(t): fake.from_tensor(t) for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, known)
