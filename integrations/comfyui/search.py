"""A search among candidates as one of ComfyUI's samplers.

ComfyUI's own sampler runs unchanged for each candidate, in a greenlet. Where it calls the model it waits, so that what
many candidates ask is one batch; after each of its steps it may wait for ever. So every sampler, scheduler, guider,
LoRA and ControlNet works, and a candidate is the picture that the KSampler node makes of its seed. ttsnap's policies
say who goes on, ttsnap's driver and ledger keep the books.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import numpy as np
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from ttsnap import policies
from ttsnap.core.driver import run
from ttsnap.core.grid import BoolArray, Combine, FloatArray, Fork, IntArray, Policy, Problem, Query
from ttsnap.core.observers import Result, Seen
from ttsnap.live.judging import judge
from ttsnap.live.result import history_of
from ttsnap.pipelines.forks import Turn, natural, rotated, turn_seed

PREVIEW = 256  # pixels of the longest side of a picture that the board shows


@dataclass
class Found:
    """What a search found.

    Attributes:
        prompt: what was judged.
        policy: its name.
        rewards: their names.
        seeds: of the candidates.
        ranks: finished candidates, the best first.
        values: combined reward of each of these.
        latents: of these [finished, channels, ...], as a VAE takes them.
        images: of these [finished, h, w, 3] in 0..1.
        history: per seed, every look at it.
        num_steps: of the sampler.
        calls: model calls, summed over candidates,
        full: and how many all candidates would have taken, finished.
        seconds: that it took.
        batches: model calls as they were run: several candidates in each.
    """

    prompt: str
    policy: str
    rewards: list[str]
    seeds: list[int]
    ranks: list[int]
    values: list[float]
    latents: Tensor
    images: Tensor
    history: dict[int, list[Seen]]
    num_steps: int
    calls: int
    full: int
    seconds: float
    batches: int

    @property
    def facts(self) -> str:
        """In one line."""
        return (
            f"{self.policy} · reward: {', '.join(self.rewards)} · {len(self.ranks)} of {len(self.seeds)} candidates "
            f"finished · {self.calls} NFE in {self.batches} batches, {self.seconds:.3g} s "
            f"(all finished: {self.full} NFE)"
        )


@dataclass(eq=False)
class Candidate:
    """One sampler that runs, or waits.

    Attributes:
        seed: of its noise, and of what the sampler draws.
        begin: steps before its own first one.
        noise: where it began: noise [1, ...] of size one,
        clean: and x0 estimate; of one that made a step, that of the step,
        level: with the index of its noise level,
        latents: and x_t; None where it has made none.
        step: steps made.
        until: where it is to stand.
        ask: what it waits for: x, sigma, and the other arguments.
        finished: latents in the end.
    """

    seed: int
    begin: int
    noise: Tensor
    clean: Tensor
    latents: Tensor | None = None
    step: int = 0
    until: int = 0
    ask: tuple[Tensor, Tensor, dict[str, Any]] | None = None
    finished: Tensor | None = None
    runs: greenlet | None = None


class _Asks:
    """Stands in the guider's place: a call of the model waits until it is answered."""

    def __init__(self, guider: Any, candidate: Candidate) -> None:
        self._guider, self._candidate = guider, candidate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def __call__(self, x: Tensor, sigma: Tensor, **others: Any) -> Tensor:
        self._candidate.ask = (x, sigma, others)
        answer: Tensor = getcurrent().parent.switch()
        return answer


@dataclass
class SearchSampler(comfy.samplers.Sampler):  # type: ignore[misc]
    """A sampler that searches: it begins many candidates with another sampler, and returns the finished, best first.

    Attributes:
        inner: ComfyUI's sampler of each candidate.
        policy: who goes on.
        count: candidates.
        seed: of the first.
        prompt: for the rewards.
        rewards: by name.
        combine: several rewards -> one number.
        decode: latents [n, ...] as a VAE takes them -> images [n, h, w, 3] in 0..1,
        look: the same for looks before the last step.
        max_batch: most candidates in one call; halved when memory runs out.
        progress: is told of calls made and of the pictures of those who are alive, or None.
    """

    inner: Any
    policy: Policy
    count: int
    seed: int
    prompt: str
    rewards: dict[str, Callable[..., Any]]
    combine: Combine
    decode: Callable[[Tensor], Tensor]
    look: Callable[[Tensor], Tensor]
    max_batch: int
    progress: Callable[[int, Sequence[np.ndarray] | None], None]
    found: Found | None = field(default=None, init=False)

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Search; arguments as ComfyUI gives them, of one latent in any number of copies."""
        start = time.perf_counter()
        grid = Grid(self, model_wrap, sigmas, extra_args, noise[:1], latent_image[:1], denoise_mask)
        rng = np.random.default_rng([self.seed, 0])
        with grid.closing():
            result = run(self.policy, grid, self.combine, rng)
        management.throw_exception_if_processing_interrupted()
        ranks, values = _ranked(result, self.combine, grid.problem.num_steps)
        latents = torch.cat([grid.candidates[c].finished for c in ranks])  # type: ignore[misc]
        self.found = Found(
            self.prompt,
            policies.to_dict(self.policy)["policy"],
            list(self.rewards),
            [candidate.seed for candidate in grid.candidates],
            ranks,
            values,
            grid.shown(latents).cpu(),
            torch.stack([grid.images[c] for c in ranks]),
            history_of(result, 0, grid.seeds, grid.problem.num_steps, grid.pictures),
            grid.problem.num_steps,
            grid.calls,
            round(grid.calls * self.count * grid.problem.num_steps / int(result.ledger.nfe[0])),
            time.perf_counter() - start,
            grid.batches,
        )
        return latents


class Grid:
    """The candidates of one search, as ttsnap's driver asks about them (`ttsnap.core.grid.Environment`)."""

    def __init__(
        self,
        search: SearchSampler,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        noise: Tensor,
        latent: Tensor,
        denoise_mask: Tensor | None,
    ) -> None:
        self.search, self.guider, self.sigmas, self.extra_args = search, guider, sigmas, extra_args
        self.latent, self.mask = latent, None if denoise_mask is None else denoise_mask[:1]
        self.problem = Problem(1, search.count, len(sigmas) - 1)
        self.batch, self.calls, self.batches = search.max_batch, 0, 0
        self.images: dict[int, Tensor] = {}
        self.pictures: dict[tuple[int, int, int], np.ndarray] = {}
        self.candidates = [self._begin(search.seed + c, noise, latent) for c in range(search.count)]

    @property
    def seeds(self) -> IntArray:
        """Of the candidates [candidates]."""
        return np.array([candidate.seed for candidate in self.candidates])

    def describe(self, prompt: int, candidate: int) -> str:
        """Name a candidate for an error message."""
        return f"seed {self.candidates[candidate].seed}"

    def observe(self, query: Query) -> FloatArray:
        """Bring candidates to a step and judge their x0 estimates; rewards [1, candidates, rewards]."""
        places = np.flatnonzero(query.mask[0]).tolist()
        self._advance([self.candidates[c] for c in places], query.step)
        rewards = np.full((1, self.problem.num_candidates, len(self.search.rewards)), np.nan)
        for start in range(0, len(places), self.batch):
            part = places[start : start + self.batch]
            rewards[0, part] = self._judged(part, query.step)
        self.search.progress(self.calls, [self.pictures[0, c, query.step] for c in places])
        management.load_models_gpu([self.guider.model_patcher, *getattr(self.guider, "loaded_models", [])])
        return rewards

    def fork(self, fork: Fork) -> FloatArray:
        """Begin children: each goes on from its parent's x0 estimate, with its noise turned."""
        born = {}
        before = self._level(fork.step)
        for c in np.flatnonzero(fork.children[0]).tolist():
            parent = self.candidates[int(fork.parents[0, c])]
            angle = float(fork.angle[0, c])
            angle = natural(before, self._level(fork.begins)) if np.isnan(angle) else angle
            noise = self._noise(parent)
            seed = turn_seed(self.candidates[c].seed, fork.step)
            turn = Turn(fork.step, angle, seed, alpha=1.0, sigma=1.0, band=fork.band)
            turned = rotated(noise, torch.zeros_like(noise), turn, torch.Generator())
            born[c] = self._begin(self.candidates[c].seed, turned, parent.clean, fork.begins, seed)
        for c, child in born.items():
            self._end(self.candidates[c])
            self.candidates[c] = child
        return np.full((1, self.problem.num_candidates, len(self.search.rewards)), np.nan)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """End the samplers that still wait."""
        try:
            yield
        finally:
            for candidate in self.candidates:
                self._end(candidate)

    def shown(self, latents: Tensor) -> Tensor:
        """Latents as a VAE takes them."""
        out: Tensor = self.guider.inner_model.process_latent_out(latents.to(torch.float32))
        return out

    def _begin(self, seed: int, noise: Tensor, latent: Tensor, begin: int = 0, turn: int | None = None) -> Candidate:
        """A candidate that has not made a call.

        Args:
            seed: of its place.
            noise: of a child; else only its shape counts.
            latent: where it begins.
            begin: steps that are not its own.
            turn: the seed of the fork that began it.
        """
        if turn is None:
            shape = torch.empty(noise.shape, dtype=torch.float32)
            noise = comfy.sample.prepare_noise(shape, seed).to(noise)
        candidate = Candidate(seed, begin, noise, latent, step=begin)
        options = {**self.extra_args, "seed": seed if turn is None else turn}

        def stand(i: int, clean: Tensor, x: Tensor, total: int) -> None:
            candidate.step, candidate.clean, candidate.latents = begin + i + 1, clean, x
            if candidate.step == candidate.until < self.problem.num_steps:
                getcurrent().parent.switch()

        def work() -> None:
            asks = _Asks(self.guider, candidate)
            sigmas = self.sigmas[begin:]
            candidate.finished = self.search.inner.sample(asks, sigmas, options, stand, noise, latent, self.mask, True)
            candidate.step = self.problem.num_steps

        candidate.runs = greenlet(work)
        candidate.runs.gr_context = contextvars.copy_context()
        return candidate

    def _end(self, candidate: Candidate) -> None:
        if candidate.runs and not candidate.runs.dead:
            candidate.runs.throw()

    def _advance(self, wanted: Sequence[Candidate], step: int) -> None:
        """Resume samplers until all stand at a step; what they ask for is run in full batches."""
        for candidate in wanted:
            candidate.until = step
        answers: dict[Candidate, Any] = dict.fromkeys(c for c in wanted if c.ask is None and c.finished is None)
        while True:
            for candidate, answer in answers.items():
                candidate.ask = None
                candidate.runs.parent = getcurrent()  # type: ignore[union-attr]
                candidate.runs.switch(*(() if answer is None else (answer,)))  # type: ignore[union-attr]
            asking = [candidate for candidate in wanted if candidate.ask is not None]
            if not asking:
                return
            first = min(asking, key=lambda candidate: (candidate.step, -float(candidate.ask[1][0])))
            answers = self._call([c for c in asking if _mergeable(first.ask, c.ask)])

    def _call(self, group: Sequence[Candidate]) -> dict[Candidate, Tensor]:
        """Answers to some candidates whose asks can be one batch: to as many as fit one."""
        management.throw_exception_if_processing_interrupted()
        group = group[: -(-len(group) // -(-len(group) // self.batch))]  # of equal batches the first
        asks = [candidate.ask for candidate in group]
        x, sigma = (torch.cat([ask[part] for ask in asks]) for part in (0, 1))
        try:
            answer = self.guider(x, sigma, **asks[0][2])
        except management.OOM_EXCEPTION:
            if len(group) == 1:
                raise
            self.batch = len(group) // 2
            answer = None
        if answer is None:  # outside the handler, where the error no longer holds on to tensors
            management.soft_empty_cache()
            return self._call(group)
        self.calls, self.batches = self.calls + len(group), self.batches + 1
        self.search.progress(self.calls, None)
        return dict(zip(group, answer.split(1), strict=True))

    def _judged(self, places: Sequence[int], step: int) -> np.ndarray:
        """Rewards [places, rewards] of what these candidates show."""
        last = step == self.problem.num_steps
        found = [self.candidates[c] for c in places]
        latents = torch.cat([c.finished if last else c.clean for c in found])  # type: ignore[misc]
        images = (self.search.decode if last else self.search.look)(self.shown(latents)).cpu().float()
        if images.ndim != 4:
            raise ValueError(f"a search judges pictures [n, h, w, 3], and this VAE makes {list(images.shape)}")
        for c, image in zip(places, images, strict=True):
            self.pictures[0, c, step] = _small(image)
            if last:
                self.images[c] = image
        sigma = 0.0 if last else float(self.sigmas[step - 1])
        seen = images.movedim(-1, 1).clamp(0, 1)
        prompts = [self.search.prompt] * len(places)
        return np.stack([judge(name, one, seen, prompts, sigma) for name, one in self.search.rewards.items()], axis=1)

    def _level(self, step: int) -> tuple[float, float]:
        """Alpha and sigma of the noise level after so many steps: x = alpha x0 + sigma eps."""
        scale = self.guider.inner_model.model_sampling.noise_scaling
        one, none = torch.ones(1, 1), torch.zeros(1, 1)
        sigma = self.sigmas[step].float().cpu()
        return float(scale(sigma, none, one)), float(scale(sigma, one.clone(), none))

    def _noise(self, candidate: Candidate) -> Tensor:
        """The noise of a candidate: of its last step, or that it began with."""
        if candidate.latents is None:
            return candidate.noise
        alpha, sigma = self._level(candidate.step - 1)
        noise: Tensor = (candidate.latents - alpha * candidate.clean) / sigma
        return noise


def _mergeable(one: Any, other: Any) -> bool:
    """Whether two asks can be one batch: the same noise level and shape, and the very same options.

    Samplers such as euler_cfg_pp hook into the model's options, each candidate with a hook of its own.
    """
    same = all(one[2].get(key) is other[2].get(key) for key in {*one[2], *other[2]} - {"seed"})
    return same and one[0].shape == other[0].shape and float(one[1][0]) == float(other[1][0])


def _ranked(result: Result, combine: Combine, num_steps: int) -> tuple[list[int], list[float]]:
    """Finished candidates, the best first, and their combined rewards."""
    finished: BoolArray = result.finished
    final = np.full((*finished.shape, result.rewards.shape[-1]), np.nan)
    for look in result.history:
        if look.step == num_steps:
            final = np.where(look.alive[..., None], look.rewards, final)
    values = combine(final, finished)[0]
    ranks = sorted(np.flatnonzero(finished[0]).tolist(), key=lambda c: (-values[c], c))
    return ranks, [float(values[c]) for c in ranks]


def _small(image: Tensor) -> np.ndarray:
    """A picture [h, w, 3] of 8 bits, of at most `PREVIEW` pixels a side."""
    scale = min(1.0, PREVIEW / max(image.shape[:2]))
    shown = image.movedim(-1, 0)[None].clamp(0, 1)
    if scale < 1:
        shown = torch.nn.functional.interpolate(shown, scale_factor=scale, mode="area")
    small: np.ndarray = (shown[0].movedim(0, -1) * 255).round().to(torch.uint8).numpy()
    return small
