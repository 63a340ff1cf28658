"""Samples candidates and keeps what every x0 estimate shows: its rewards, or the image itself.

Candidates run in fixed groups, so that one that was interrupted runs in the same company again: the results of a
resumed run are those of an uninterrupted one to the last bit.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.core.grid import BoolArray, IntArray
from ttsnap.files.storage import AnyPath, location
from ttsnap.live.judging import apart, judge_in_parts
from ttsnap.live.settings import changes
from ttsnap.recordings.image_tree import ImageTree
from ttsnap.recordings.recording import Recording

if TYPE_CHECKING:
    from torch import Tensor

    from ttsnap.pipelines.limits import Limits
    from ttsnap.pipelines.sampler import Sampler
    from ttsnap.pipelines.views import View


def seeds_of(prompts: Sequence[int], per_prompt: int, seed: int = 0) -> IntArray:
    """Seeds [prompts, candidates], different for every prompt (by its index) and candidate."""
    if per_prompt < 1:
        raise ValueError(f"candidates per prompt must be at least 1, got {per_prompt}")
    return seed + np.asarray(prompts, dtype=np.int64)[:, None] * per_prompt + np.arange(per_prompt)


def chosen_calls(calls: Sequence[int] | None, num_steps: int) -> tuple[int, ...]:
    """The calls to record, ascending; all by default, and always the last, which finishes the image."""
    chosen = sorted(set(calls or range(1, num_steps + 1)) | {num_steps})
    if not 1 <= chosen[0] <= chosen[-1] <= num_steps:
        wrong = next(call for call in chosen if not 1 <= call <= num_steps)
        raise ValueError(f"calls must be in 1..{num_steps}, got {wrong}")
    return tuple(chosen)


def looks(calls: Sequence[int] | None, features: bool, num_steps: int) -> tuple[int, ...]:
    """The calls after which rewards are recorded: all; beside features only the last, unless some are chosen."""
    return chosen_calls((num_steps,) if features and calls is None else calls, num_steps)


def walk(sampler: Sampler, prompts: Sequence[str], seeds: Sequence[int], calls: Sequence[int]) -> Iterator[View]:
    """A view of n candidates after each of `calls`.

    The sampler's preview, if it has one, makes their pictures before the last call.
    """
    from ttsnap.pipelines.views import View

    state = sampler.start(prompts, seeds)
    for call in calls:
        state = sampler.advance(state, call)
        yield View(sampler, state)


def recorded_names(rewards: Mapping[str, Any]) -> list[str]:
    """Names in a recording: a noise-aware reward goes under the name of its clean one, with the values of both.

    Raises:
        ValueError: two would have the same name.
    """
    names = [getattr(reward, "clean_name", "") or name for name, reward in rewards.items()]
    if len(set(names)) < len(names):
        raise ValueError(f"a recording keeps each reward once, got {', '.join(names)}; leave out the clean one")
    return names


def judge_all(
    rewards: Mapping[str, Any],
    seen: Tensor | View,
    prompts: Sequence[str],
    sigma: float,
    limits: Limits | None = None,
) -> np.ndarray:
    """Clean and noise-aware rewards [2, n, rewards] of images or a view; NaN where no noise-aware reward serves.

    Raises:
        ValueError: a reward reads features, and there are only images.
    """
    from ttsnap.pipelines.limits import Limits
    from ttsnap.pipelines.views import View, reads_features

    limits = limits or Limits(len(seen))
    images = seen.shown if isinstance(seen, View) else seen
    values = np.full((2, len(seen), len(rewards)), np.nan, dtype=np.float32)
    for column, (name, reward) in enumerate(rewards.items()):
        values[0, :, column] = judge_in_parts(
            limits, name, reward, images, prompts, 0.0 if hasattr(reward, "level") else sigma
        )
        if hasattr(reward, "level") and reward.level(sigma) is not None:
            if reads_features(reward, sigma) and seen is images:
                raise ValueError(f"{name} reads the denoiser's features, which no image holds; use `ttsnap record`")
            values[1, :, column] = judge_in_parts(limits, name, reward, seen, prompts, sigma)
    return values


def groups(num_prompts: int, per_prompt: int, batch: int) -> Iterator[tuple[range, list[slice]]]:
    """Prompts that run together, and slices of their candidates (in prompt order) of at most `batch` each."""
    together = max(1, batch // per_prompt)
    for first in range(0, num_prompts, together):
        prompts = range(first, min(first + together, num_prompts))
        count = len(prompts) * per_prompt
        yield prompts, split(count, batch)


def split(count: int, batch: int) -> list[slice]:
    """Slices of at most `batch` of `count` rows."""
    return [slice(start, min(start + batch, count)) for start in range(0, count, batch)]


def record_rewards(
    sampler: Sampler,
    rewards: Mapping[str, Any],
    prompts: Sequence[str],
    seeds: IntArray,
    out: str | AnyPath,
    *,
    calls: Sequence[int] | None = None,
    features: bool = False,
    settings: Mapping[str, Any] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Recording:
    """Judge the x0 estimates of every candidate and store the rewards, prompt by prompt; no image is written.

    A recording of the same settings is gone on with.

    Args:
        sampler: drives the model.
        rewards: name -> reward; a noise-aware one is stored beside its clean one, under the name of that.
        prompts: all prompts [P].
        seeds: seeds [P, candidates].
        out: the recording to write.
        calls: after which calls to look (default: all, with `features` the last); the last always counts.
        features: keep what the denoiser knows, too, after `calls` (default: early ones), to train a judge on it.
        settings: configuration to keep as provenance; a recording made with others is refused.
        on_start: called once with the number of images that are left to judge.
        on_images: called with the number of images just judged.

    Raises:
        ValueError: settings differ from those of the recording that is there, or a reward is not a finite number.
    """
    recording = begin_rewards(sampler, rewards, prompts, seeds, out, calls=calls, features=features, settings=settings)
    done = recording.done
    everything = groups(len(prompts), seeds.shape[1], sampler.max_batch)
    todo = [list(rows) for rows, _ in everything if not done[list(rows)].all()]
    chosen = looks(calls, features, sampler.num_steps)
    if on_start:
        on_start(sum(map(len, todo)) * seeds.shape[1] * len(chosen))
    for rows in todo:
        for images, failures in judge_group(sampler, rewards, recording, rows, seeds, chosen, done):
            if on_images and images:
                on_images(images)
            for error in failures.values():
                raise error
    return recording


def begin_rewards(
    sampler: Sampler,
    rewards: Mapping[str, Any],
    prompts: Sequence[str],
    seeds: IntArray,
    out: str | AnyPath,
    *,
    calls: Sequence[int] | None = None,
    features: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Recording:
    """The recording that `record_rewards` fills, new or gone on with; arguments and errors are the same."""
    from ttsnap.files.provenance import versions
    from ttsnap.pipelines.features import attach
    from ttsnap.pipelines.flops import cost_model
    from ttsnap.recordings import features as kept

    attach(sampler, rewards)
    names = recorded_names(rewards)
    settings = dict(settings or {}) | {"calls": list(looks(calls, features, sampler.num_steps))}
    if features:
        if sampler.tap or sampler.diversity:
            raise ValueError("features are kept beside clean rewards of candidates that are not pushed apart")
        plan = kept.plan(sampler, prompts[0], calls)
        settings["features"] = [f"{place.module} {place.side}" for place in plan.places]
    recording = Recording.create(
        out,
        prompts=prompts,
        num_candidates=seeds.shape[1],
        num_steps=sampler.num_steps,
        rewards=names,
        sigmas=sampler.sigmas,
        provenance={
            "made by": "ttsnap record",
            "settings": settings,
            "guides": list(rewards),
            "versions": versions(),
            "cost_model": cost_model(sampler, rewards, prompts[0]).tflops(),
        },
        resume=True,
    )
    check_same(settings, recording.provenance.get("settings", {}), recording.path)
    if features and kept.kept_in(recording) != plan:
        kept.create(recording, plan)
    done = recording.done
    if (recording.seeds[done] != seeds[done]).any():
        raise ValueError(f"{recording.path} was recorded with other seeds")
    return recording


def judge_group(
    sampler: Sampler,
    rewards: Mapping[str, Any],
    recording: Recording,
    rows: Sequence[int],
    seeds: IntArray,
    calls: Sequence[int],
    done: BoolArray,
) -> Iterator[tuple[int, dict[int, Exception]]]:
    """Sample and judge one group of prompts, and store the rewards of each that is not done and does not fail.

    A reward that fails on the whole group is asked about each prompt alone.

    Yields:
        How many images were just judged; in the end 0 and the prompts that failed, with their errors.
    """
    from ttsnap.pipelines.features import attach, tap
    from ttsnap.recordings.features import Heard, kept_in

    attach(sampler, rewards)
    kept = kept_in(recording)
    if kept:
        sampler.tap = tap(sampler, kept.places)
    per_prompt, steps, names = seeds.shape[1], sampler.num_steps, list(recording.rewards)
    texts = [recording.prompts[p] for p in rows for _ in range(per_prompt)]
    numbers = seeds[list(rows)].ravel()
    heard = Heard(kept, len(texts)) if kept else None
    every = sorted({*calls, *(kept.calls if kept else ())})
    values = np.full((2, len(texts), steps, len(rewards)), np.nan, dtype=np.float32)
    failures: dict[int, Exception] = {}
    sampler.group(texts, numbers.tolist())
    for part in split(len(texts), sampler.max_batch):
        mine = range(len(texts))[part]
        shares = {n: list(own) for n, own in itertools.groupby(mine, lambda row: row // per_prompt)}
        for view in walk(sampler, texts[part], numbers[part].tolist(), every):
            if kept and heard and view.group.step in kept.calls:
                heard.put(mine.start, view.group.step, view.features, texts[part])
            if view.group.step not in calls:
                continue

            def look(chosen: Sequence[int], view: View = view, first: int = mine.start) -> None:
                index, prompts = list(chosen), [texts[row] for row in chosen]
                seen, call = view[[row - first for row in index]], view.group.step
                values[:, index, call - 1] = judge_all(rewards, seen, prompts, view.sigma, sampler.limits)
                check_finite(values[0, index, call - 1], names, prompts, numbers[index], call)

            for n, error in zip(shares, apart(look, list(shares.values())), strict=True):
                if error:
                    failures.setdefault(rows[n], error)
            yield len(view), {}
    sampler.forget_prompts()
    parts = values.reshape(2, len(rows), per_prompt, steps, -1)
    for number, (p, clean, aware) in enumerate(zip(rows, *parts, strict=True)):
        if not done[p] and p not in failures:
            if heard:
                heard.store(recording, p, slice(number * per_prompt, (number + 1) * per_prompt))
            recording.write_prompt(p, clean, aware, seeds=seeds[p])
    yield 0, failures


def record_images(
    sampler: Sampler,
    tree: ImageTree,
    prompts: Sequence[int] | None = None,
    *,
    workers: int | None = None,
    on_images: Callable[[int], None] | None = None,
    on_found: Callable[[int], None] | None = None,
) -> int:
    """Store the x0 estimates of every candidate as images, written in the background while the model runs.

    Only what is not there yet is made: images that are missing, truncated or of the wrong size.

    Args:
        sampler: drives the model.
        tree: where the images go, and prompts, seeds and calls; see `plan_tree`.
        prompts: indices of the prompts to record (default: all).
        workers: threads that compress and write (default: one per core, at most 8).
        on_images: called with the number of images just made.
        on_found: called with the number of images just found in place.

    Returns:
        Images made.

    Raises:
        ValueError: the tree that is there was made with other settings.
        OSError: an image cannot be written, such as on a full disk; whatever is stored is whole, so that the same
            call goes on from there.
    """
    tree.save()
    everything = 0
    for made, found in make_images(sampler, tree, range(len(tree.prompts)) if prompts is None else prompts, workers):
        everything += made
        if on_found and found:
            on_found(found)
        if on_images and made:
            on_images(made)
    return everything


def make_images(
    sampler: Sampler, tree: ImageTree, prompts: Sequence[int], workers: int | None = None
) -> Iterator[tuple[int, int]]:
    """The images of some prompts; yields how many were just made, and found. In the end all of them are stored."""
    from ttsnap.pipelines.outputs import to_uint8

    per_prompt = tree.num_candidates
    with ImageWriter(tree.write, workers) as writer:
        for rows, parts in groups(len(prompts), per_prompt, sampler.max_batch):
            candidates = [(prompts[row], c) for row in rows for c in range(per_prompt)]
            sampler.group([tree.prompts[p] for p, _ in candidates], [int(tree.seeds[pair]) for pair in candidates])
            for part in parts:
                group = candidates[part]
                todo = {
                    (row, call)
                    for row, (p, c) in enumerate(group)
                    for call in tree.calls
                    if not tree.begun(p) or tree.fault(p, c, call)
                }
                yield 0, len(group) * len(tree.calls) - len(todo)
                if not todo:
                    continue
                texts, seeds = [tree.prompts[p] for p, _ in group], [int(tree.seeds[pair]) for pair in group]
                for view in walk(sampler, texts, seeds, sorted({call for _, call in todo})):
                    call = view.group.step
                    chosen = [row for row in range(len(group)) if (row, call) in todo]
                    images = view.shown[:, 0] if view.shown.ndim == 5 else view.shown  # of a video its one frame
                    pictures = to_uint8(enlarge(images, sampler.height, sampler.width))
                    writer.put([(tree.path(*group[row], call), pictures[row]) for row in chosen])
                    yield len(chosen), 0
            sampler.forget_prompts()


def enlarge(images: Tensor, height: int, width: int) -> Tensor:
    """Pictures of a small preview at the size of the finished image, as all images of a tree have one size."""
    from torch.nn import functional as F

    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear")


class ImageWriter:
    """Writes images on background threads; compression runs while others hold the interpreter.

    A context: it ends when all is written, or raises what the first failure raised.

    Args:
        write: stores one image [h, w, 3] under a path.
        workers: number of threads (default: one per core, at most 8).
        backlog: most batches under way; `put` then waits, so that a slow disk cannot fill the memory.
    """

    def __init__(
        self, write: Callable[[AnyPath, np.ndarray], None], workers: int | None = None, backlog: int = 4
    ) -> None:
        self.workers = workers or min(8, os.cpu_count() or 1)
        self._write = write
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="image-writer")
        self._free = BoundedSemaphore(backlog * self.workers)
        self._failure: BaseException | None = None

    def put(self, images: Sequence[tuple[AnyPath, np.ndarray]]) -> None:
        """Hand over images to write.

        Raises:
            OSError: an earlier image could not be written.
        """
        size = -(-len(images) // self.workers)
        for start in range(0, len(images), size or 1):
            self._free.acquire()
            if self._failure:
                self._free.release()
                raise self._failure
            self._pool.submit(self._work, images[start : start + size])

    def _work(self, images: Sequence[tuple[AnyPath, np.ndarray]]) -> None:
        try:
            for path, image in images:
                if self._failure is None:
                    self._write(path, image)
        except BaseException as error:
            self._failure = error
        finally:
            self._free.release()

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._pool.shutdown(wait=True)
        if self._failure and kind is None:
            raise self._failure


def plan_tree(
    sampler: Sampler,
    root: str | AnyPath,
    prompts: Sequence[str],
    seeds: IntArray,
    *,
    calls: Sequence[int] | None = None,
    store_size: int | None = None,
    image_format: str = "png",
    settings: Mapping[str, Any] | None = None,
) -> ImageTree:
    """The tree that `record_images` fills.

    Args:
        sampler: tells steps, noise levels and image size.
        root: its directory.
        prompts: all prompts [P].
        seeds: seeds [P, candidates].
        calls: after which calls to store an image (default: all); the last always counts.
        store_size: pixels of the shorter side of the stored images (default: as they are decoded).
        image_format: `png`, or `webp` (lossless).
        settings: what decides the images; a tree made with others is refused.

    Raises:
        ValueError: no such size or calls, or a pipeline that makes videos of which more than one frame is looked at.
    """
    from ttsnap.files.provenance import versions
    from ttsnap.pipelines.flops import cost_model

    if len(sampler.look_frames) > 1:
        raise ValueError(
            f"{type(sampler.pipe).__name__} makes videos, and a tree keeps one image of each look: choose one frame "
            "(--look-frames middle), or record rewards and no images (--reward)"
        )
    size = (sampler.width, sampler.height)
    if store_size is not None:
        if not 1 <= store_size <= min(size):
            raise ValueError(f"images of {size[0]} x {size[1]} can be stored at 1 to {min(size)}, got {store_size}")
        size = (round(size[0] * store_size / min(size)), round(size[1] * store_size / min(size)))
    return ImageTree(
        location(root),
        tuple(prompts),
        seeds,
        sampler.num_steps,
        chosen_calls(calls, sampler.num_steps),
        tuple(sampler.sigmas),
        size,
        image_format,
        dict(settings or {}),
        versions(),
        cost_model(sampler, {}).tflops(),
    )


def check_same(settings: Mapping[str, Any], found: Mapping[str, Any], path: AnyPath) -> None:
    """Raise ValueError unless the settings are those that `path` was begun with."""
    different = changes(found, settings)
    if different:
        raise ValueError(
            f"{path} was begun with other settings ({', '.join(different)} differ); give the same, or another output"
        )


def check_finite(values: np.ndarray, names: list[str], prompts: list[str], seeds: IntArray, call: int) -> None:
    """Raise ValueError about the first of the rewards [n, rewards] after a call that is not a finite number."""
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(
            f"reward {names[column]!r} returned {values[row, column]:g} for prompt {prompts[row]!r}, "
            f"seed {seeds[row]} at step {call}"
        )
