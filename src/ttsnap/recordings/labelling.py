"""From images on disk, or published labels of finished images, to a recording."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ttsnap.core.grid import BoolArray, IntArray
from ttsnap.files.reading import ahead
from ttsnap.files.storage import AnyPath, location, new_folder
from ttsnap.files.text import read_text
from ttsnap.live.judging import apart
from ttsnap.recordings.image_tree import BadImageError, ImageTree
from ttsnap.recordings.published_values import MAX_FILE_BYTES, PRINT_SCALES, REWARD_NAMES
from ttsnap.recordings.recorder import check_finite, check_same, groups, judge_all, recorded_names, split
from ttsnap.recordings.recording import Recording

_FLOAT, _INT = "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"


@dataclass
class Labels:
    """What labelling a tree came to.

    Attributes:
        recording: holds every prompt whose images are all there.
        bad: images that are missing, damaged or of the wrong size.
        left_out: prompts [indices] with such an image; once they are recorded again, labelling takes them up.
        not_begun: prompts of which the tree has nothing yet.
    """

    recording: Recording
    bad: list[BadImageError] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    not_begun: int = 0


def label_tree(
    tree: ImageTree,
    rewards: Mapping[str, Any],
    out: str | AnyPath,
    *,
    final_only: bool = False,
    strict: bool = False,
    batch: int = 32,
    workers: int | None = None,
    device: Any = "cpu",
    on_start: Callable[[int], None] | None = None,
    on_images: Callable[[int], None] | None = None,
) -> Labels:
    """Judge the images of a tree, prompt by prompt; images are decoded on threads ahead of the rewards.

    A recording of the same tree is gone on with. A prompt with a bad image is left out: a replay needs all its images.

    Args:
        tree: the images.
        rewards: name -> reward; a noise-aware one is stored beside its clean one, under the name of that.
        out: the recording to write.
        final_only: judge finished images only.
        strict: stop at the first bad image.
        batch: most images in one look.
        workers: threads that decode (default: one per core, at most 8).
        device: where the rewards take their images.
        on_start: called once with the number of images that are left to judge.
        on_images: called with the number of images just judged.

    Raises:
        BadImageError: with `strict`, the first image that is missing, damaged or of the wrong size.
        ValueError: the recording that is there is of another tree, or a reward is not a finite number.
    """
    recording = begin_labels(tree, rewards, out, final_only=final_only, device=device)
    done = recording.done
    begun = np.array([tree.begun(p) for p in range(len(tree.prompts))])
    labels = Labels(recording, not_begun=int((~begun).sum()))
    blocks = [[p for p in rows if begun[p]] for rows, _ in groups(len(tree.prompts), tree.num_candidates, batch)]
    blocks = [block for block in blocks if not done[block].all()]
    calls = (tree.num_steps,) if final_only else tree.calls
    if on_start:
        on_start(sum(map(len, blocks)) * tree.num_candidates * len(calls))
    for part in judge_blocks(
        tree, rewards, recording, blocks, calls, strict=strict, batch=batch, threads=workers, device=device, done=done
    ):
        if on_images and part.images:
            on_images(part.images)
        labels.bad += part.bad
        labels.left_out += sorted({p for p in part.failures if isinstance(part.failures[p], BadImageError)})
        for error in part.failures.values():
            if not isinstance(error, BadImageError):
                raise error
    return labels


def begin_labels(
    tree: ImageTree,
    rewards: Mapping[str, Any],
    out: str | AnyPath,
    *,
    final_only: bool = False,
    device: Any = "cpu",
    contents: Mapping[str, str] | None = None,
) -> Recording:
    """The recording that `label_tree` fills, new or gone on with; arguments and errors are the same.

    `contents`: fingerprints of the rewards' weights and code; a recording made with others is refused.
    """
    from ttsnap.files.provenance import versions

    calls = (tree.num_steps,) if final_only else tree.calls
    settings = {**tree.settings, "calls": list(calls), "image size": list(tree.size)}
    if contents:
        settings["contents"] = {**tree.settings.get("contents", {}), **contents}
    recording = Recording.create(
        out,
        prompts=tree.prompts,
        num_candidates=tree.num_candidates,
        num_steps=tree.num_steps,
        rewards=recorded_names(rewards),
        sigmas=tree.sigmas,
        provenance={
            "made by": "ttsnap label",
            "settings": settings,
            "versions": versions(),
            "images by": dict(tree.versions),
            **_costs(tree, rewards, device),
        },
        resume=True,
    )
    check_same(settings, recording.provenance.get("settings", {}), recording.path)
    done = recording.done
    if (recording.seeds[done] != tree.seeds[done]).any():
        raise ValueError(f"{recording.path} was recorded with other seeds than {tree.root}")
    return recording


@dataclass
class Judged:
    """A part of labelling: images just judged; with the last part of a block its bad images, failures and results.

    Attributes:
        images: how many were just judged.
        bad: images that are missing, damaged or of the wrong size.
        failures: prompt -> why it has no rewards.
        stored: prompts whose rewards were just stored.
    """

    images: int = 0
    bad: list[BadImageError] = field(default_factory=list)
    failures: dict[int, Exception] = field(default_factory=dict)
    stored: list[int] = field(default_factory=list)


def judge_blocks(
    tree: ImageTree,
    rewards: Mapping[str, Any],
    recording: Recording,
    blocks: Sequence[Sequence[int]],
    calls: Sequence[int],
    *,
    strict: bool = False,
    batch: int = 32,
    threads: int | None = None,
    device: Any = "cpu",
    done: BoolArray,
) -> Iterator[Judged]:
    """Judge blocks of prompts, whose images are read ahead on threads; a prompt that fails fails alone."""
    threads = threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="image-reader") as pool:
        loaded = ahead(pool, _load, ((tree, block, call) for block in blocks for call in calls), 2 * threads)
        try:
            for block in blocks:
                yield from _judge_block(
                    tree, rewards, recording, block, calls, loaded, strict=strict, batch=batch, device=device, done=done
                )
        finally:
            loaded.close()


def _judge_block(
    tree: ImageTree,
    rewards: Mapping[str, Any],
    recording: Recording,
    block: Sequence[int],
    calls: Sequence[int],
    loaded: Iterator[Any],
    *,
    strict: bool,
    batch: int,
    device: Any,
    done: BoolArray,
) -> Iterator[Judged]:
    import torch

    steps, per_prompt, names = tree.num_steps, tree.num_candidates, list(recording.rewards)
    texts = [tree.prompts[p] for p in block for _ in range(per_prompt)]
    numbers = tree.seeds[list(block)].ravel()
    values = np.full((2, len(texts), steps, len(rewards)), np.nan, dtype=np.float32)
    last = Judged()
    for call in calls:
        images, faults = next(loaded)
        if faults and strict:
            raise faults[0][1]
        last.bad += [error for _, error in faults]
        for p, error in faults:
            last.failures.setdefault(p, error)
        sigma = 0.0 if call == steps else tree.sigmas[call - 1]
        for part in split(len(texts), batch):
            mine = range(len(texts))[part]
            shares = {n: list(own) for n, own in itertools.groupby(mine, lambda row: row // per_prompt)}
            tensor = torch.from_numpy(images[part]).to(device).permute(0, 3, 1, 2).float() / 255

            def look(
                chosen: Sequence[int],
                call: int = call,
                tensor: Any = tensor,
                sigma: float = sigma,
                first: int = mine.start,
            ) -> None:
                index, prompts = list(chosen), [texts[row] for row in chosen]
                shown = tensor[[row - first for row in index]]
                values[:, index, call - 1] = judge_all(rewards, shown, prompts, sigma)
                check_finite(values[0, index, call - 1], names, prompts, numbers[index], call)

            for n, error in zip(shares, apart(look, list(shares.values())), strict=True):
                if error:
                    last.failures.setdefault(block[n], error)
            yield Judged(images=len(tensor))
    for p, clean, aware in zip(block, *values.reshape(2, len(block), per_prompt, steps, -1), strict=True):
        if p not in last.failures and not done[p]:
            recording.write_prompt(p, clean, aware, seeds=tree.seeds[p])
            last.stored.append(p)
    yield last


def _costs(tree: ImageTree, rewards: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """The cost model of those who made the images, with the looks of these rewards; nothing where it is unknown."""
    import torch

    from ttsnap.pipelines.flops import count_looks, count_texts

    if not tree.cost_model:
        return {}
    height, width, prompt = *tree.size[::-1], tree.prompts[0]
    look, text = count_looks(rewards, torch.zeros(1, 3, height, width, device=device), prompt)
    texts = count_texts(rewards, tree.sigmas, device, height, width, prompt)
    early = [{**cost, "judge_tflop": look} for cost in tree.cost_model.get("early", ())]
    known = {**tree.cost_model, "look_tflop": look, "prompt_tflop": tree.cost_model.get("prompt_tflop", 0.0) + text}
    extra = {"early": early, "texts": [asdict(one) for one in texts]}
    return {"cost_model": known | {name: costs for name, costs in extra.items() if costs}}


def _load(tree: ImageTree, prompts: list[int], call: int) -> tuple[np.ndarray, list[tuple[int, BadImageError]]]:
    """All images [n, h, w, 3] of some prompts after a call; bad ones are blank, and told with their prompts."""
    images = np.zeros((len(prompts), tree.num_candidates, *tree.size[::-1], 3), dtype=np.uint8)
    bad = []
    for row, p in enumerate(prompts):
        for c in range(tree.num_candidates):
            try:
                images[row, c] = tree.read(p, c, call)
            except BadImageError as error:
                bad.append((p, error))
    return images.reshape(-1, *images.shape[2:]), bad


def import_ground_truth(
    files: Mapping[str, str | Path],
    prompts: Sequence[str],
    out: str | AnyPath,
    *,
    num_steps: int = 20,
    seeds: IntArray | None = None,
) -> Recording:
    """Published labels of finished images as a recording that knows nothing of earlier steps.

    Args:
        files: reward name -> YAML file `p0000: {id000: value}`.
        prompts: texts of the prompts; of those that no file names nothing is recorded.
        out: the recording to write.
        num_steps: denoiser calls of a finished image.
        seeds: seed of each candidate [prompts, candidates] (optional).

    Raises:
        ValueError: a file is refused (by name and line), or files and prompts do not fit together.
    """
    from ttsnap.files.provenance import versions

    out = location(out)
    if out.exists():
        raise ValueError(f"{out} exists already; remove it, or choose another name")
    values = {name: read_ground_truth(path) for name, path in files.items()}
    first, *others = values
    for other in others:
        if {p: len(row) for p, row in values[other].items()} != {p: len(row) for p, row in values[first].items()}:
            raise ValueError(f"{files[first]} and {files[other]} differ in their prompts or images")
    candidates = len(next(iter(values[first].values())))
    listed = np.array(sorted(values[first]))
    if listed[-1] >= len(prompts):
        raise ValueError(f"{files[first]} labels prompt {listed[-1]}, but there are only {len(prompts)} prompts")
    if seeds is not None and seeds.shape[1] != candidates:
        raise ValueError(f"{files[first]} labels {candidates} images of a prompt, the tree has {seeds.shape[1]}")
    clean = np.full((len(prompts), candidates, num_steps, len(values)), np.nan)
    for column, rows in enumerate(values.values()):
        for p, row in rows.items():
            clean[p, :, -1, column] = row
    last = clean[listed, :, -1]
    with new_folder(out, "zarr.json") as temporary:
        recording = Recording.create(
            temporary,
            prompts=prompts,
            num_candidates=candidates,
            num_steps=num_steps,
            rewards=list(values),
            scales={name: PRINT_SCALES[name] for name in values if name in PRINT_SCALES},
            provenance={
                "made by": "ttsnap label --ground-truth",
                "files": {name: Path(path).name for name, path in files.items()},
                "versions": versions(),
            },
            dtype="float32" if (last.astype(np.float32) == last).all() else "float64",
            whole=True,
        )
        for run in np.split(listed, np.flatnonzero(np.diff(listed) > 1) + 1):
            part = slice(int(run[0]), int(run[-1]) + 1)
            recording.write(part, clean[part], seeds=None if seeds is None else seeds[part])
    return Recording(out)


def ground_truth_name(path: str | Path) -> str:
    """The reward that a published file such as `imr_gt_flux_5k.yaml` is of.

    Raises:
        ValueError: its name does not tell.
    """
    start = Path(path).stem.split("_")[0].lower()
    names = {**REWARD_NAMES, "pick": "pickscore", **{name: name for name in REWARD_NAMES.values()}}
    if start not in names:
        raise ValueError(f"which reward is {path} of? give its name, such as imagereward={path}")
    return names[start]


def read_ground_truth(path: str | Path) -> dict[int, list[float]]:
    """Labels by prompt, one per image; every prompt has as many as the first.

    The file is parsed into nodes and never into objects: tags mean nothing.

    Raises:
        ValueError: the file is not what is expected; names file and line.
    """
    import yaml

    path = Path(path)
    text = read_text(path, MAX_FILE_BYTES, "labels from")
    try:
        node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{path}, line {mark.line + 1 if mark else 1}: not valid YAML: {problem}") from error
    labels: dict[int, list[float]] = {}
    for prompt, images, line in _entries(path, node, "p"):
        row = {}
        for image, value, at in _entries(path, images, "id"):
            if value.tag not in (_FLOAT, _INT) or not np.isfinite(number := _number(value.value)):
                raise ValueError(f"{path}, line {at}: expected a finite number, got {value.value!r:.40}")
            row[image] = number
        if sorted(row) != list(range(len(row))):
            missing = next(i for i in range(len(row)) if i not in row)
            raise ValueError(f"{path}, line {line}: prompt p{prompt:04d} lacks id{missing:03d}")
        count = len(next(iter(labels.values()), row))
        if len(row) != count:
            raise ValueError(f"{path}, line {line}: prompt p{prompt:04d} has {len(row)} images, the first has {count}")
        labels[prompt] = [row[i] for i in range(count)]
    return labels


def _entries(path: Path, node: Any, letters: str) -> Iterator[tuple[int, Any, int]]:
    """Number, value and line of each entry of a mapping with keys such as `p0000`."""
    line = node.start_mark.line + 1 if node else 1
    if node is None or node.id != "mapping" or not node.value:
        raise ValueError(f"{path}, line {line}: expected labels such as `p0000: {{id000: 0.27}}`")
    seen = set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        match = re.fullmatch(rf"{letters}(\d{{1,8}})", key.value) if isinstance(key.value, str) else None
        if not match:
            raise ValueError(f"{path}, line {line}: expected a key such as {letters}000, got {key.value!r:.40}")
        number = int(match[1])
        if number in seen:
            raise ValueError(f"{path}, line {line}: {key.value} appears twice")
        seen.add(number)
        yield number, value, line


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
