"""Live: answer a policy by running the real pipeline."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.cost import CostModel, Seconds
from ttsnap.observers import SILENT, Interrupted, Observer, Stop, spread
from ttsnap.types import FloatArray, IntArray, Problem, Query

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ttsnap.samplers.base import PipelineSampler, Trajectories
    from ttsnap.samplers.views import View

PREVIEW_SIDE = 256


@dataclass
class Clock:
    """Seconds spent in denoiser calls, decodes, previews and looks."""

    calls: float = 0.0
    decodes: float = 0.0
    previews: float = 0.0
    looks: float = 0.0

    @contextmanager
    def measure(self, what: str, device: Any) -> Iterator[None]:
        """Add the time of a block to `what`; waits for the accelerator, so that the time is real."""
        _wait(device)
        start = time.perf_counter()
        yield
        _wait(device)
        setattr(self, what, getattr(self, what) + time.perf_counter() - start)


def _wait(device: Any) -> None:
    if getattr(device, "type", "cpu") == "cuda":
        import torch

        torch.cuda.synchronize(device)


@dataclass
class LiveEnvironment:
    """A block of prompts, each with its candidates, on one sampler.

    All candidates that are asked about run together, whatever their prompt, so that batches stay full. Latents of
    pruned candidates are kept until the environment is dropped, in main memory: any of them may be asked about again.

    Attributes:
        sampler: drives the pipeline.
        rewards: name -> reward; the policy sees them combined.
        prompts: one per row of the grid.
        seeds: seeds [prompts, candidates].
        previews: keep a small picture of every x0 estimate that was looked at.
        observer: is told of denoiser calls and judged batches, and may stop the work there.
        park: keep candidates that a query leaves out in main memory (default: where the device has its own).
        only_shown: pictures that were made for `previews` alone, as no reward asked for them; no cost model knows them.
    """

    sampler: PipelineSampler
    rewards: Mapping[str, Any]
    prompts: Sequence[str]
    seeds: IntArray
    previews: bool = False
    observer: Observer = SILENT
    park: bool | None = None
    only_shown: int = 0
    clock: Clock = field(default_factory=Clock)
    pictures: dict[tuple[int, int, int], np.ndarray] = field(default_factory=dict, repr=False)
    finished: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)
    _states: dict[tuple[int, int], Trajectories] = field(default_factory=dict, repr=False)
    _parked: set[tuple[int, int]] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self.seeds = np.asarray(self.seeds)
        if self.seeds.ndim != 2 or len(self.seeds) != len(self.prompts) or self.seeds.size == 0:
            raise ValueError(
                f"seeds must have shape [{len(self.prompts)} prompts, candidates], not empty, got {self.seeds.shape}"
            )
        if not self.rewards:
            raise ValueError("a search needs at least one reward")
        self.listen()

    def listen(self) -> None:
        """Have the sampler keep the features that the rewards read; another search may have used it meanwhile."""
        from ttsnap.samplers.features import attach

        attach(self.sampler, self.rewards)

    @property
    def problem(self) -> Problem:
        """The grid: prompts x seeds x the sampler's steps."""
        return Problem(self.seeds.shape[0], self.seeds.shape[1], self.sampler.num_steps)

    def observe(self, query: Query) -> FloatArray:
        """Advance, decode and judge; rewards [prompts, candidates, rewards], NaN where not asked.

        All of that batch by batch: full-size images of all candidates need not fit into memory at once, and what is
        judged can be shown, and survives a stop.

        Raises:
            Interrupted: the observer stopped it; the answer so far is in the exception.
        """
        answer = np.full((*query.mask.shape, len(self.rewards)), np.nan)
        self.listen()
        asked = [(int(p), int(c)) for p, c in np.argwhere(query.mask)]
        self._place(asked)
        self._start(asked)
        judged = np.zeros_like(query.mask)
        for keys in self._batches(query):
            calls: list[int] = []
            try:
                group = self._advance(keys, query.step, calls)
                for key, values in zip(keys, self._look(keys, group), strict=True):
                    answer[key] = values
                    judged[key] = True
                calls.clear()
                self.observer.judged(query.step, answer)
            except Stop:
                lost = spread(sum(calls), np.array([p for p, _ in keys]), len(self.prompts))
                raise Interrupted(judged, answer, lost) from None
        return answer

    def _start(self, keys: Sequence[tuple[int, int]]) -> None:
        """Draw the noise of those that have none yet."""
        new = [key for key in keys if key not in self._states]
        if new:
            self.sampler.group(self.prompts, self.seeds[:, 0].tolist())
            group = self.sampler.start([self.prompts[p] for p, _ in new], [int(self.seeds[key]) for key in new])
            self._states |= {key: group.row(row) for row, key in enumerate(new)}

    def _place(self, asked: Sequence[tuple[int, int]]) -> None:
        """Those asked about onto the device, all others off it."""
        device = self.sampler.device
        if self.park is False or (self.park is None and device.type == "cpu"):
            return
        for key in self._parked.intersection(asked):
            self._states[key] = self._states[key].to(device)
        self._parked.difference_update(asked)
        for key in self._states.keys() - set(asked) - self._parked:
            self._states[key] = self._states[key].to("cpu")
            self._parked.add(key)

    def held(self) -> int:
        """Bytes that candidates take on the device, those that are parked in main memory left out."""
        states = [state for key, state in self._states.items() if key not in self._parked]
        storages = [tensor.untyped_storage() for state in states for tensor in state.tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def _batches(self, query: Query) -> Iterator[list[tuple[int, int]]]:
        """Those asked about, in equal batches that fit into memory, each at one step."""
        groups: dict[int, list[tuple[int, int]]] = {}
        for p, c in np.argwhere(query.mask):
            groups.setdefault(self._states[int(p), int(c)].step, []).append((int(p), int(c)))
        for keys in groups.values():
            start = 0
            while start < len(keys):
                batches = -(-(len(keys) - start) // self.sampler.max_batch)  # which shrinks when memory runs out
                size = -(-(len(keys) - start) // batches)
                yield keys[start : start + size]
                start += size

    def _advance(self, keys: Sequence[tuple[int, int]], step: int, calls: list[int]) -> Trajectories:
        """A batch brought to `step`; `calls` receives the denoiser calls as they are made."""
        from ttsnap.samplers.base import Trajectories

        group = Trajectories.concat([self._states[key] for key in keys])
        before = self.sampler.on_calls

        def called(count: int) -> None:
            calls.append(count)
            if before:
                before(count)
            self.observer.called(count)

        self.sampler.on_calls = called
        try:
            with self.clock.measure("calls", group.latents.device):
                group = self.sampler.advance(group, step)
        finally:
            self.sampler.on_calls = before
        self._states |= {key: group.row(row) for row, key in enumerate(keys)}
        return group

    def _look(self, keys: Sequence[tuple[int, int]], group: Trajectories) -> FloatArray:
        """Rewards [n, rewards] of a batch's x0 estimates."""
        from ttsnap.samplers.views import View, need_pictures

        view = View(self.sampler, group)
        if need_pictures(self.rewards, view.sigma):
            self._picture(view)
        with self.clock.measure("looks", group.latents.device):
            values = [judge(name, reward, view, group.prompts, view.sigma) for name, reward in self.rewards.items()]
        self.keep_pictures(keys, group.step, view, group.step == self.problem.num_steps)
        return np.stack(values, axis=1).astype(np.float64)

    def _picture(self, view: View) -> Tensor:
        """The pictures of a view, made here if they are not yet, where the clock knows what for."""
        step, device = view.group.step, view.group.latents.device
        with self.clock.measure("previews" if self.sampler.preview_at(step) else "decodes", device):
            return view.images

    def step_of(self, prompt: int, candidate: int) -> int:
        """Denoiser calls a candidate has had."""
        state = self._states.get((prompt, candidate))
        return state.step if state else 0

    def state(self, prompt: int, candidate: int) -> Trajectories:
        """A candidate that was begun."""
        return self._states[prompt, candidate]

    def keep(self, prompt: int, candidate: int, group: Trajectories, row: int) -> None:
        """Remember where a candidate stands: row `row` of `group`."""
        self._states[prompt, candidate] = group.row(row)

    def keep_pictures(self, where: Sequence[tuple[int, int]], step: int, view: View, last: bool) -> None:
        """Pictures of the looked at [n], if previews are kept, and of the finished in any case."""
        if not (self.previews or last):
            return
        if view.made is None:
            self.only_shown += len(view)
        images = self._picture(view)
        full = to_uint8(images)
        small = to_uint8(shrink(view.shown)) if self.previews else full
        for key, big, little in zip(where, full, small, strict=True):
            if last:
                self.finished[key] = big
            if self.previews:
                self.pictures[(*key, step)] = little

    def adopt(self, other: LiveEnvironment) -> None:
        """Take over the trajectories and finished images of another search with the same prompts and first seeds."""
        for key, state in other._states.items():
            if key[1] < self.seeds.shape[1] and int(self.seeds[key]) == int(other.seeds[key]):
                self._states[key] = state
                self._parked |= {key} & other._parked
        self.finished |= {key: image for key, image in other.finished.items() if key in self._states}

    def describe(self, prompt: int, candidate: int) -> str:
        """Name a candidate for an error message."""
        return f"prompt {self.prompts[prompt]!r}, seed {int(self.seeds[prompt, candidate])}"


def judge(name: str, reward: Any, seen: Tensor | View, prompts: Sequence[str], sigma: float) -> np.ndarray:
    """Rewards [n] of images [n, 3, h, w] in 0..1 or of a view of candidates, fp32 on the CPU.

    Of a view, a reward that reads features is given these wherever it can, and pictures elsewhere.

    Raises:
        ValueError: the reward did not answer with one number per image.
    """
    import torch

    from ttsnap.samplers.views import View, reads_features

    with torch.no_grad():
        if isinstance(seen, View) and reads_features(reward, sigma):
            answer = reward.early(seen.features, prompts, sigma=sigma)
        else:
            answer = _of_frames(reward, seen.shown if isinstance(seen, View) else seen, prompts, sigma)
        answer = torch.as_tensor(answer).float().cpu()
    if answer.shape not in ((len(seen),), (len(seen), 1)):
        raise ValueError(
            f"reward {name!r} must return one number per image, shape [{len(seen)}], got {list(answer.shape)}"
        )
    values: np.ndarray = answer.reshape(len(seen)).numpy()
    return values


def _of_frames(reward: Any, images: Tensor, prompts: Sequence[str], sigma: float) -> Any:
    """What a reward says of images [n, 3, h, w]; of videos [n, frames, 3, h, w], its mean over the frames."""
    import torch

    if images.ndim == 4:
        return reward(images, prompts, sigma=sigma)
    videos, frames = images.shape[:2]
    values = torch.as_tensor(reward(images.flatten(0, 1), [p for p in prompts for _ in range(frames)], sigma=sigma))
    if values.numel() != videos * frames:
        raise ValueError(f"a reward must return one number per frame, [{videos * frames}], got {list(values.shape)}")
    return values.reshape(videos, frames).float().mean(1)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images [..., 3, h, w] in 0..1 as uint8 [..., h, w, 3], rounded as the stock pipelines do."""
    array: np.ndarray = (images * 255).round().clamp(0, 255).byte().movedim(-3, -1).cpu().numpy()
    return array


def shrink(images: Tensor) -> Tensor:
    """Images with a longest side of at most PREVIEW_SIDE pixels; of videos the middle frame."""
    from torch.nn import functional as F

    if images.ndim == 5:
        images = images[:, images.shape[1] // 2]
    longest = max(images.shape[-2:])
    if longest <= PREVIEW_SIDE:
        return images
    size = [max(1, round(side * PREVIEW_SIDE / longest)) for side in images.shape[-2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def calibrate(
    sampler: PipelineSampler,
    rewards: Mapping[str, Any],
    model: CostModel,
    prompt: str,
    clock: Callable[[], float] = time.perf_counter,
    patience: float = 5.0,
) -> CostModel:
    """Measure this machine: seconds of a call, a decode and a look (and of those of early looks), for one and a batch.

    Two batch sizes give a fixed part per batch and a part per image. Of up to three repetitions the slowest counts,
    so that a budget in seconds is kept to. Where a full batch would take longer than `patience`, a smaller one is
    measured.

    Args:
        sampler: drives the pipeline; forgets its prompts.
        rewards: the rewards of the search.
        model: the counted cost model that receives the seconds.
        prompt: any prompt of the search.
        clock: returns seconds; tests pass their own.
        patience: seconds after which a measurement is not repeated.
    """
    from ttsnap.samplers.features import attach
    from ttsnap.samplers.views import View, need_pictures

    attach(sampler, rewards)

    def trial(size: int) -> FloatArray:
        start = sampler.start([prompt] * size, list(range(size)))
        device = start.latents.device
        marks = [_now(clock, device)]
        made = sampler.advance(start, 1)
        marks.append(_now(clock, device))
        for step in (sampler.num_steps, *(int(look.until) for look in model.early)):
            view = View(sampler, replace(made, step=step))  # a look there takes as long
            if need_pictures(rewards, view.sigma):
                view.images  # noqa: B018
            marks.append(_now(clock, device))
            for name, reward in rewards.items():
                judge(name, reward, view, [prompt] * size, view.sigma)
            marks.append(_now(clock, device))
        return np.diff(marks)

    def slowest(size: int) -> FloatArray:
        start = clock()
        trial(size)  # warm up
        trials = [trial(size)]
        while len(trials) < 3 and clock() - start < patience:
            trials.append(trial(size))
        return np.asarray(np.max(trials, axis=0))

    with warnings.catch_warnings():  # the search itself will say that a prompt is cut or a batch too large
        warnings.simplefilter("ignore")
        one = slowest(1)
        size = min(sampler.max_batch, max(2, int(patience / max(one.sum(), 1e-9))))
        many = slowest(size) if size > 1 else one
        size = min(size, sampler.max_batch)  # halved by now if memory ran out
    sampler.forget_prompts()
    each = np.maximum((many - one) / (size - 1), 0.0) if size > 1 else np.zeros(len(one))
    fixed = np.maximum(one - each, 0.0)
    call, decode, look, *rest = (Seconds(float(f), float(e)) for f, e in zip(fixed, each, strict=True))
    early = tuple(
        replace(cost, picture_seconds=picture, judge_seconds=judged)
        for cost, picture, judged in zip(model.early, rest[::2], rest[1::2], strict=True)
    )
    return replace(
        model, call_seconds=call, decode_seconds=decode, look_seconds=look, max_batch=sampler.max_batch, early=early
    )


def _now(clock: Callable[[], float], device: Any) -> float:
    _wait(device)
    return clock()
