"""The published reward values: folders of YAML files, one per reward and step, into one recording.

The layout is `{model}_{reward}_val_{base|naft}/p{P}_i{I}_s{SS}.yaml`: P prompts x I images, a mapping from prompt index
to a list of rewards. `base` holds the clean reward, `naft` the noise-aware one. Step id SS is the x0 estimate after
SS + 1 denoiser calls; the last one is the finished image.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ttsnap.core.grid import FloatArray
from ttsnap.files.storage import new_folder
from ttsnap.recordings.recording import Recording

REWARD_NAMES = {"hps": "hpsv2", "imr": "imagereward", "pic": "pickscore"}
# (mean, std): the authors print HPS x 100 and ImageReward by its published normalisation.
PRINT_SCALES = {"hpsv2": (0.0, 0.01), "imagereward": (0.16717362830052426, 1.0333394966054072)}
MAX_FILE_BYTES = 2**28
_FOLDER = re.compile(r"(?P<model>.+)_(?P<reward>[^_]+)_val_(?P<kind>base|naft)")
_FILE = re.compile(r"p(?P<prompts>\d{1,7})_i(?P<images>\d{1,7})_s(?P<step>\d{1,5})\.ya?ml")
_KEY = re.compile(r"(\d{1,9}):\s*")


@dataclass(frozen=True)
class ValueFiles:
    """The files of one model and reward: size of the grid, and per step id the clean and the noise-aware file."""

    model: str
    reward: str
    num_prompts: int
    num_images: int
    base: dict[int, Path]
    naft: dict[int, Path]


def find(folder: str | Path) -> list[ValueFiles]:
    """Models and rewards whose values lie in a folder, sorted by name.

    Raises:
        ValueError: no values there, a step is missing, or files of one reward differ in size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    kinds: dict[tuple[str, str], dict[str, dict[int, Path]]] = {}
    sizes: dict[tuple[str, str], dict[tuple[int, int], Path]] = {}
    for inner in sorted(folder.iterdir()):
        match = _FOLDER.fullmatch(inner.name)
        if not match or not inner.is_dir():
            continue
        key = (match["model"], match["reward"])
        for path in sorted(inner.iterdir()):
            name = _FILE.fullmatch(path.name)
            if not name:
                continue
            steps = kinds.setdefault(key, {"base": {}, "naft": {}})[match["kind"]]
            if int(name["step"]) in steps:
                raise ValueError(f"{path} and {steps[int(name['step'])].name} hold the same step")
            steps[int(name["step"])] = path
            sizes.setdefault(key, {})[int(name["prompts"]), int(name["images"])] = path
    if not kinds:
        raise ValueError(f"{folder} holds no value folders such as flux_hps_val_base/p200_i200_s00.yaml")
    found: list[ValueFiles] = []
    for (model, reward), files in sorted(kinds.items()):
        if len(sizes[model, reward]) > 1:
            one, other, *_ = sizes[model, reward].values()
            raise ValueError(f"{one} and {other} differ in their numbers of prompts or images")
        ((prompts, images),) = sizes[model, reward]
        if 0 in (prompts, images):
            raise ValueError(f"{sizes[model, reward][prompts, images]} announces no prompts or no images")
        numbers = sorted(files["base"])
        where = folder / f"{model}_{reward}_val_base"
        if not numbers:
            raise ValueError(f"{where} is missing: without clean rewards there is no target")
        if numbers != list(range(len(numbers))):
            missing = next(step for step in range(len(numbers)) if step not in files["base"])
            raise ValueError(f"{where} lacks step {missing:02d}; its steps must run from 00 to {numbers[-1]:02d}")
        if stray := [step for step in files["naft"] if step >= len(numbers)]:
            raise ValueError(f"{files['naft'][stray[0]]} has no clean counterpart; the last is step {numbers[-1]:02d}")
        found.append(ValueFiles(model, reward, prompts, images, files["base"], files["naft"]))
    return found


def import_values(
    folder: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    rewards: Sequence[str] | None = None,
    prompts: Sequence[str] | None = None,
    overwrite: bool = False,
    on_file: Callable[[Path, int], None] | None = None,
) -> Recording:
    """Read published values into a recording; nothing is left behind when a file is refused.

    Args:
        folder: the folder of value folders.
        out: the recording to write.
        model: which model (needed when there are several).
        rewards: which rewards, in this order, by the short or long name (default: all of the model).
        prompts: texts of the prompts, at least as many as recorded (default: numbers).
        overwrite: replace `out` if it is a recording.
        on_file: called with each file before it is read and the number of all, for progress displays.

    Raises:
        ValueError: a file is refused (by name and line), or sizes do not fit.
    """
    from ttsnap.core import __version__

    out = Path(out)
    if out.exists():
        if not overwrite:
            raise ValueError(f"{out} exists already; use --overwrite or choose another name")
        Recording(out)  # refuses to replace anything else
    chosen = choose(find(folder), model, rewards)
    first = chosen[0]
    for other in chosen[1:]:
        if (other.num_prompts, other.num_images, len(other.base)) != (
            first.num_prompts,
            first.num_images,
            len(first.base),
        ):
            raise ValueError(f"the rewards {first.reward} and {other.reward} differ in prompts, images or steps")
    if prompts is not None and len(prompts) < first.num_prompts:
        raise ValueError(f"the values are of {first.num_prompts} prompts, but only {len(prompts)} texts were given")
    texts = prompts[: first.num_prompts] if prompts else [f"prompt {i}" for i in range(first.num_prompts)]

    shape = (first.num_prompts, first.num_images, len(first.base), len(chosen))
    clean, aware = np.empty(shape), np.full(shape, np.nan)
    number = sum(len(files.base) + len(files.naft) for files in chosen)
    for column, files in enumerate(chosen):
        for target, paths in ((clean, files.base), (aware, files.naft)):
            for step, path in paths.items():
                if on_file:
                    on_file(path, number)
                target[:, :, step, column] = read_values(path, files.num_prompts, files.num_images)
    single = (clean.astype(np.float32) == clean).all() and ((aware.astype(np.float32) == aware) | np.isnan(aware)).all()
    names = [REWARD_NAMES.get(files.reward, files.reward) for files in chosen]
    with new_folder(out, "zarr.json") as temporary:
        recording = Recording.create(
            temporary,
            prompts=texts,
            num_candidates=shape[1],
            num_steps=shape[2],
            rewards=names,
            scales={name: PRINT_SCALES[name] for name in names if name in PRINT_SCALES},
            provenance={
                "made by": f"ttsnap {__version__} import-values",
                "source": Path(folder).name,
                "model": first.model,
                "noise-aware steps": {files.reward: [step + 1 for step in sorted(files.naft)] for files in chosen},
            },
            dtype="float32" if single else "float64",
            whole=True,
        )
        recording.write(slice(None), clean, aware)
        if out.exists():
            shutil.rmtree(out)
    return Recording(out)


def choose(found: list[ValueFiles], model: str | None, rewards: Sequence[str] | None) -> list[ValueFiles]:
    """The files of one model, in the order of the rewards asked for."""
    models = sorted({files.model for files in found})
    if model is None and len(models) > 1:
        raise ValueError(f"there are values of several models, choose one: {', '.join(models)}")
    model = model or models[0]
    by_reward = {files.reward: files for files in found if files.model == model}
    if not by_reward:
        raise ValueError(f"there are no values of model {model!r}; there are {', '.join(models)}")
    by_reward |= {REWARD_NAMES[name]: files for name, files in by_reward.items() if name in REWARD_NAMES}
    if rewards is None:
        return [files for files in found if files.model == model]
    for name in rewards:
        if name not in by_reward:
            raise ValueError(f"there are no values of reward {name!r}; there are {', '.join(by_reward)}")
    return [by_reward[name] for name in rewards]


def read_values(path: Path, num_prompts: int, num_images: int) -> FloatArray:
    """Rewards [prompts, images] of one file.

    Block style, as the files are published, is read line by line; any other safe YAML goes through PyYAML.

    Raises:
        ValueError: the file is not what its name announces; names file and line.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size >> 20} MiB; more than {MAX_FILE_BYTES >> 20} are refused")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text: byte {error.start} is not UTF-8") from error
    rows, lines = _read_block(path, text) or _read_yaml(path, text)
    if len(rows) != num_prompts or set(rows) != set(range(num_prompts)):
        missing = next((i for i in range(num_prompts) if i not in rows), None)
        stray = next((i for i in rows if i >= num_prompts), None)
        if stray is not None:
            raise ValueError(
                f"{path}, line {lines[stray]}: prompt {stray}, but its name announces {num_prompts} prompts"
            )
        raise ValueError(f"{path} lacks prompt {missing}; its name announces {num_prompts} prompts (truncated?)")
    for prompt, row in rows.items():
        if len(row) != num_images:
            raise ValueError(
                f"{path}, line {lines[prompt]}: prompt {prompt} has {len(row)} values, "
                f"but the name announces {num_images} images"
            )
    values = np.array([rows[prompt] for prompt in range(num_prompts)], dtype=np.float64)
    if not np.isfinite(values).all():
        prompt, image = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(
            f"{path}, line {lines[int(prompt)] + 1 + int(image)}: image {image} of prompt {prompt} has reward "
            f"{values[prompt, image]}, which is not finite"
        )
    return values


def _read_block(path: Path, text: str) -> tuple[dict[int, list[float]], dict[int, int]] | None:
    """Values and line of each prompt, or None when the file uses more of YAML than the published ones do."""
    rows: dict[int, list[float]] = {}
    lines: dict[int, int] = {}
    row: list[float] | None = None
    if "_" in text:
        return None
    for number, line in enumerate(text.split("\n"), start=1):
        if line[:2] == "- " and row is not None:
            try:
                row.append(float(line[2:]))
            except ValueError:
                return None
        elif match := _KEY.fullmatch(line):
            key = int(match[1])
            if key in rows:
                raise ValueError(f"{path}, line {number}: prompt {key} appears twice")
            row = rows[key] = []
            lines[key] = number
        elif line:
            return None
    if rows and not text.endswith("\n"):
        raise ValueError(f"{path}, line {text.count(chr(10)) + 1}: the file ends in the middle of a line (truncated?)")
    return (rows, lines) if rows else None


def _read_yaml(path: Path, text: str) -> tuple[dict[int, list[float]], dict[int, int]]:
    """The same through PyYAML's parser; only its events, so that no tag, anchor or nesting ever becomes an object."""
    import yaml

    rows: dict[int, list[float]] = {}
    lines: dict[int, int] = {}
    inside = ""  # "", "mapping" or "list"
    key: int | None = None
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            line = event.start_mark.line + 1 if event.start_mark else 1
            if getattr(event, "anchor", None) or (getattr(event, "tag", None) not in (None, "!")):
                raise ValueError(f"{path}, line {line}: tags, anchors and aliases are refused")
            if isinstance(event, yaml.MappingStartEvent) and not inside and not rows:
                inside = "mapping"
            elif isinstance(event, yaml.SequenceStartEvent) and inside == "mapping" and key is not None:
                inside = "list"
            elif isinstance(event, yaml.ScalarEvent) and inside == "mapping" and key is None:
                if not re.fullmatch(r"\d{1,9}", event.value):
                    raise ValueError(f"{path}, line {line}: expected a prompt index, got {_short(event.value)}")
                key = int(event.value)
                if key in rows:
                    raise ValueError(f"{path}, line {line}: prompt {key} appears twice")
                rows[key], lines[key] = [], line
            elif isinstance(event, yaml.ScalarEvent) and inside == "list" and key is not None:
                rows[key].append(_number(event.value if not event.style else "", f"{path}, line {line}", event.value))
            elif isinstance(event, yaml.SequenceEndEvent) and inside == "list":
                inside, key = "mapping", None
            elif isinstance(event, yaml.MappingEndEvent) and inside == "mapping":
                inside = ""
            elif isinstance(event, (yaml.NodeEvent, yaml.CollectionEndEvent)):
                raise ValueError(f"{path}, line {line}: expected a mapping from prompt index to a list of rewards")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{path}, line {mark.line + 1 if mark else 1}: not valid YAML: {problem}") from error
    if not rows:
        raise ValueError(f"{path}, line 1: the file holds no values")
    return rows, lines


def _number(text: str, where: str, shown: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: expected a number, got {_short(shown)}") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 30 else text[:30] + "…")
