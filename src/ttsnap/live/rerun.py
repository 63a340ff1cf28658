"""What a picture keeps of its search: the options of `ttsnap generate` that make it again, and the text for viewers.

Nothing of the machine is kept. Of files and folders that were named, such as a model's, only the last part of the path
is written down, and `local` lists the options that have to be named again; fingerprints tell whether they are the same.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap import policies
from ttsnap.core import __version__
from ttsnap.core.ranking import WeightedSum
from ttsnap.files.metadata import Metadata, Parameters
from ttsnap.live.settings import fingerprint
from ttsnap.pipelines.added_files import listed, split
from ttsnap.pipelines.conditions import ARGUMENTS, Pictures
from ttsnap.pipelines.models import MODELS
from ttsnap.rewards import REWARDS

if TYPE_CHECKING:
    from ttsnap.live.open_search import Setup
    from ttsnap.live.result import BestOfNComparison, SearchResult

CALL = {  # arguments of the pipeline's call that have an option of their own
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "negative_prompt": "negative_prompt",
}
SAMPLERS = {  # schedulers as AUTOMATIC1111 calls them
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSinglestepScheduler": "DPM++ 2S",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "FlowMatchEulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}
HUB_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")


@dataclass(frozen=True)
class Origin:
    """What a result's pictures keep of how they were made.

    Attributes:
        settings: options of `ttsnap generate`, by their names.
        local: those of them that named files of this machine or objects of this process, which nobody else has.
        contents: fingerprints of the model's files and of pictures that the pipeline was given.
        fields: Steps, Sampler and so on, for `parameters`.
        place: of the prompt among all that were searched for; a policy's randomness depends on it.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    local: tuple[str, ...] = ()
    contents: dict[str, str] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    place: int = 0


def origin_of(setup: Setup, seed: int, place: int = 0) -> Origin:
    """What the pictures of a search keep.

    Args:
        setup: model, rewards, policy and candidates.
        seed: the first.
        place: of the prompt among all.
    """
    sampler, asked = setup.sampler, dict(setup.asked)
    local, contents = set[str](), dict[str, str]()
    pictures = asked.get("pictures") or Pictures()
    arguments = {name: v for name, v in sampler.arguments.items() if not (pictures and name in ARGUMENTS)}
    local |= pictures.given().keys() - {"strength"}
    contents |= {name: hashlib.sha256(str(value).encode()).hexdigest() for name, value in pictures.settings().items()}
    model, weights = _model(setup.model)
    if weights is not None:
        contents["model"] = _known_fingerprint(weights, weights.stat().st_mtime_ns)
    if model != setup.model or (model not in MODELS and "/" not in model):
        local.add("model")
    found: dict[str, Any] = {"model": model, "dtype": str(getattr(sampler.pipe, "dtype", "")).removeprefix("torch.")}
    if arguments.get("height") and arguments.get("width"):
        found["size"] = f"{arguments.pop('width')}x{arguments.pop('height')}"
    found |= {option: arguments.pop(name) for name, option in CALL.items() if arguments.get(name) is not None}
    call = []
    for name, value in arguments.items():
        if value is None:
            continue
        if (text := _written(value)) is None or _public(str(value)) != str(value):
            local.add(name)
            if hasattr(value, "tobytes") and hasattr(value, "size"):
                contents[name] = hashlib.sha256(f"{value.size}".encode() + value.tobytes()).hexdigest()
        elif name == "strength":  # has an option of its own, beside the picture's
            found[name] = value
        else:
            call.append(f"{name}={text}")
    if setup.sampler.diversity:
        parameters = setup.sampler.diversity.parameters.to_dict()
        found["diversity"] = parameters.pop("name")
        found["diversity_options"] = ",".join(f"{n}={v}" for n, v in parameters.items() if v is not None)
    preview = asked.get("preview")
    found["preview"] = preview if preview not in (None, "auto") else sampler.preview.name if sampler.preview else "full"
    found["reward"] = asked.get("reward") or ",".join(setup.judges)
    if not all(re.split("[=+:]", name)[0] in REWARDS or ":" in name for name in found["reward"].split(",")):
        local.add("reward")  # a callable of one's own
    found |= {
        name: asked[name]
        for name in ("scheduler", "cache", "draft_cache", "attention", "config", "quantize", "vae")
        if asked.get(name)
    }
    for name in ("lora", "embedding", "text_encoder"):
        given = listed(asked.get(name, ()))
        found[name] = [_public_source(text) for text in given]
        if found[name] != given:
            local.add(name)
    found["look_frames"] = ",".join(map(str, sampler.look_frames))
    found["weights"] = (
        ",".join(f"{w:g}" for w in setup.combine.weights) if isinstance(setup.combine, WeightedSum) else ""
    )
    for name, value in found.items():
        if name not in ("model", "negative_prompt") and isinstance(value, str) and _public(value) != value:
            local.add(name)
            found[name] = _public(value)
    policy = json.loads(json.dumps(policies.to_dict(setup.policy)))  # with lists, as it will be read
    found |= {"policy": policy, "candidates": setup.candidates, "seed": seed, "call": call}
    if setup.different:
        found |= {"different": True, "top": setup.different}
    settings = {name: value for name, value in found.items() if value not in (None, "", [])}
    return Origin(settings, tuple(sorted(local)), contents, _fields(setup, model, weights), place)


def metadata(result: SearchResult, rank: int, comparison: BestOfNComparison) -> Metadata:
    """What a picture of a result says of itself.

    Args:
        result: of a search.
        rank: of the picture among the finished, 1 for the best; 0: that of best-of-N at the same cost,
        comparison: which is this one.
    """
    origin = result.origin
    image = comparison.best if rank == 0 else result.images[rank - 1]
    assert image is not None
    cost, settings = result.cost, origin.settings
    started, finished, lineage = result.started, result.finished, list[dict[str, Any]]()
    if rank == 0:
        cost, settings = comparison.cost, settings | {"policy": {"policy": "best-of-n"}}
        settings["candidates"] = started = finished = comparison.candidates
        settings |= {"steps": comparison.num_steps} if comparison.num_steps else {}
    else:
        seed = image.seed
        while (ancestor := result.lineage.get(seed)) and len(lineage) < len(result.lineage):
            lineage.append({"seed": seed, "parent": ancestor.seed, "step": ancestor.step, "angle": ancestor.angle})
            seed = ancestor.seed
    own = {
        "version": __version__,
        "prompt": result.prompt,
        "settings": settings,
        "local": list(origin.local),
        "contents": origin.contents,
        "place": origin.place,
        "seed": image.seed,
        "reward": image.reward,
        "rewards": image.rewards,
        "rank": rank or 1,
        "started": started,
        "finished": finished,
        "stopped": result.stopped,
        "cost": {name: value for name, value in cost.to_dict().items() if name != "seconds"},  # the rest is the same
        "lineage": lineage,
    }
    fields = {"Seed": str(image.seed), **origin.fields}
    fields |= {"Steps": str(comparison.num_steps)} if rank == 0 and comparison.num_steps else {}
    order = [
        name for name in ("Steps", "Sampler", "Schedule type", "CFG scale", "Distilled CFG Scale") if name in fields
    ]
    fields = {name: fields[name] for name in (*order, "Seed")} | fields
    return Metadata(Parameters(result.prompt, str(settings.get("negative_prompt", "")), fields), own)


def options(own: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `ttsnap generate` that make a picture again, from what it says of itself.

    Raises:
        ValueError: it does not say how it was made.
    """
    settings = own.get("settings")
    if not isinstance(settings, dict) or not isinstance(own.get("prompt"), str):
        raise ValueError("the picture does not say how it was made: its metadata has no prompt or no settings")
    policy = settings.get("policy")
    return settings | ({"policy": json.dumps(policy)} if isinstance(policy, dict) else {})


# The text for viewers.


def _fields(setup: Setup, model: str, weights: Path | None) -> dict[str, str]:
    """The fields of `parameters`, but for the seed."""
    sampler = setup.sampler
    fields = {"Steps": str(sampler.arguments.get("num_inference_steps") or sampler.num_steps)}
    if (scheduler := getattr(sampler.pipe, "scheduler", None)) is not None:
        kind = type(scheduler).__name__
        fields["Sampler"] = SAMPLERS.get(kind, kind.removesuffix("Scheduler"))
        if getattr(scheduler.config, "algorithm_type", "").startswith("sde-"):
            fields["Sampler"] += " SDE"
        if getattr(scheduler.config, "use_karras_sigmas", False):
            fields["Schedule type"] = "Karras"
    scales = {name: _argument(sampler, name) for name in ("guidance_scale", "true_cfg_scale")}
    if scales["true_cfg_scale"] is not None:  # the other is fed to a distilled model
        fields["CFG scale"] = f"{scales['true_cfg_scale']:g}"
        if scales["guidance_scale"] is not None:
            fields["Distilled CFG Scale"] = f"{scales['guidance_scale']:g}"
    elif scales["guidance_scale"] is not None:
        fields["CFG scale"] = f"{scales['guidance_scale']:g}"
    fields["Size"] = f"{sampler.width}x{sampler.height}"
    if weights is not None:
        fields["Model hash"] = _model_hash(weights, weights.stat().st_mtime_ns)
    return fields | {"Model": Path(model).stem or model, "RNG": "CPU", "Version": f"ttsnap {__version__}"}


def _argument(sampler: Any, name: str) -> float | None:
    """A number that the pipeline's call is given, or takes unless told otherwise."""
    value = sampler.arguments.get(name)
    if value is None and name in sampler.taken:
        parameter = inspect.signature(type(sampler.pipe).__call__).parameters.get(name)
        value = parameter.default if parameter else None
    return float(value) if isinstance(value, int | float) else None


# What of it is the machine's.


def _model(name: str) -> tuple[str, Path | None]:
    """How others call a model, and where its files lie here."""
    if name in MODELS:
        return name, Path(MODELS[name].weights)
    path = Path(name)
    if (found := HUB_CACHE.search(path.as_posix() + "/")) and path.exists():
        return f"{found[1]}/{found[2]}", path
    return (_public(name), path) if path.exists() else (_public(name), _cached(name))


def _cached(name: str) -> Path | None:
    """Where the hub's cache keeps a model."""
    from huggingface_hub import try_to_load_from_cache

    if name.count("/") != 1:
        return None
    found = try_to_load_from_cache(name, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def _public(text: str) -> str:
    """A name without the folders of this machine: in `NAME=/home/me/weights.pt` the last part is left."""
    parts = re.split(r"([=+,])", text)
    return "".join(Path(part).name if _is_path(part) else part for part in parts)


def _public_source(text: str) -> str:
    """The same of `FILE:WEIGHT` and `PART=DIR`."""
    named, end = split(text)
    part, equals, source = named.rpartition("=")
    if Path(source).exists():
        source = Path(source).name
    return f"{part}{equals}{source}" + (f":{end}" if end is not None else "")


def _is_path(text: str) -> bool:
    if "/" not in text and "\\" not in text:
        return False
    try:
        return text.startswith(("/", "~", ".", "\\")) or text[1:3] in (":\\", ":/") or Path(text).exists()
    except OSError:  # too long for a path
        return False


def _written(value: Any) -> str | None:
    """An argument as the option `--call` takes it; None for what is no JSON value."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return None


@lru_cache(64)
def _known_fingerprint(path: Path, changed: int) -> str:
    return fingerprint(path)


@lru_cache(64)
def _model_hash(path: Path, changed: int) -> str:
    """The first ten digits of a file's SHA-256, by which sites of models know it; of a folder, of its fingerprint."""
    if path.is_dir():
        return _known_fingerprint(path, changed)[:10]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


__all__ = ["Origin", "metadata", "options", "origin_of"]
