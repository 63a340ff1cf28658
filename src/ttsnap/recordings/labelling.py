"""From images on disk, or published labels of finished images, to a recording."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ttsnap.recordings.image_tree import BadImageError, ImageTree
from ttsnap.recordings.published_values import MAX_FILE_BYTES, PRINT_SCALES, REWARD_NAMES
from ttsnap.recordings.recorder import check_finite, check_same, groups, judge_all, recorded_names
from ttsnap.recordings.recording import Recording
from ttsnap.types import IntArray

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
    out: str | Path,
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
    import torch

    from ttsnap.provenance import versions

    steps, per_prompt, names = tree.num_steps, tree.num_candidates, recorded_names(rewards)
    calls = (steps,) if final_only else tree.calls
    settings = {**tree.settings, "calls": list(calls), "image size": list(tree.size)}
    recording = Recording.create(
        out,
        prompts=tree.prompts,
        num_candidates=per_prompt,
        num_steps=steps,
        rewards=names,
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
    begun = np.array([tree.begun(p) for p in range(len(tree.prompts))])
    labels = Labels(recording, not_begun=int((~begun).sum()))
    blocks = [[p for p in rows if begun[p]] for rows, _ in groups(len(tree.prompts), per_prompt, batch)]
    blocks = [block for block in blocks if not done[block].all()]
    if on_start:
        on_start(sum(map(len, blocks)) * per_prompt * len(calls))

    def look(images: np.ndarray, prompts: list[str], call: int) -> Iterator[np.ndarray]:
        sigma = 0.0 if call == steps else tree.sigmas[call - 1]
        for part in (slice(start, start + batch) for start in range(0, len(images), batch)):
            tensor = torch.from_numpy(images[part]).to(device).permute(0, 3, 1, 2).float() / 255
            yield judge_all(rewards, tensor, prompts[part], sigma)
            if on_images:
                on_images(len(tensor))

    threads = workers or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="image-reader") as pool:
        work = ((tree, block, call) for block in blocks for call in calls)
        loaded = ahead(pool, _load, work, 2 * threads)
        for block in blocks:
            prompts = [tree.prompts[p] for p in block for _ in range(per_prompt)]
            values = np.full((2, len(block), per_prompt, steps, len(rewards)), np.nan, dtype=np.float32)
            left_out = set()
            for call in calls:
                images, faults = next(loaded)
                if faults and strict:
                    loaded.close()
                    raise faults[0][1]
                labels.bad += [error for _, error in faults]
                left_out |= {p for p, _ in faults}
                answers = np.concatenate(list(look(images, prompts, call)), axis=1)
                values[:, :, :, call - 1] = answers.reshape(2, len(block), per_prompt, -1)
            for p, clean, aware in zip(block, *values, strict=True):
                if p in left_out or done[p]:
                    continue
                for call in calls:
                    texts = [tree.prompts[p]] * per_prompt
                    check_finite(clean[:, call - 1], names, texts, tree.seeds[p], call)
                recording.write_prompt(p, clean, aware, seeds=tree.seeds[p])
            labels.left_out += sorted(left_out)
    return labels


def _costs(tree: ImageTree, rewards: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """The cost model of those who made the images, with the looks of these rewards; nothing where it is unknown."""
    import torch

    from ttsnap.samplers.flops import count_looks

    if not tree.cost_model:
        return {}
    look = count_looks(rewards, torch.zeros(1, 3, *tree.size[::-1], device=device), tree.prompts[0])
    early = [{**cost, "judge_tflop": look} for cost in tree.cost_model.get("early", ())]
    return {"cost_model": {**tree.cost_model, "look_tflop": look} | ({"early": early} if early else {})}


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


def ahead(
    pool: ThreadPoolExecutor, work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], depth: int
) -> Generator[Any, None, None]:
    """Results in order; up to `depth` pieces of work are under way ahead of them."""
    waiting: deque[Future[Any]] = deque()
    try:
        for these in arguments:
            waiting.append(pool.submit(work, *these))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def import_ground_truth(
    files: Mapping[str, str | Path],
    prompts: Sequence[str],
    out: str | Path,
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
    from ttsnap.provenance import versions

    out = Path(out)
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
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.label"
    try:
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
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
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
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read labels from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: byte {error.start} is not UTF-8") from error
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
