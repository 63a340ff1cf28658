"""What a user asks of a search or a recording: frozen dataclasses, each a group of options of the command line.

The values are as they were typed. All of them are read when a settings object is made, so that whatever is wrong is
said before anything is loaded. The attributes' descriptions are the help of the options.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap.core import MAX_CANDIDATES
from ttsnap.core.values import read_value
from ttsnap.files.pictures import LONGEST_SIDE, parse_frames
from ttsnap.files.prompts import check_characters
from ttsnap.pipelines.additions import Additions
from ttsnap.pipelines.conditions import Pictures
from ttsnap.pipelines.loading import Loading
from ttsnap.pipelines.patience import check_timeout
from ttsnap.pipelines.schedulers import check_scheduler
from ttsnap.pipelines.sizes import read_ratio

if TYPE_CHECKING:
    from ttsnap.core.grid import Policy
    from ttsnap.live.session import Session
    from ttsnap.pipelines.sampler import Sampler
    from ttsnap.policies import SuccessiveHalving

MAX_SEED = 2**62  # seeds of candidates count up from the first
MAX_STEPS = 1000
SAMPLES, SAMPLE = 16, 1 << 16  # of a file of weights: pieces that are hashed, and bytes of each


@dataclass(frozen=True, kw_only=True)
class CallSettings:
    """The model, the arguments of its call, and what is done beside it.

    Attributes:
        model: `shapes` (embedded), a hub id, a diffusers directory, or a .safetensors or .gguf file.
        steps: Denoiser calls of a finished image.
        size: Image size in pixels: 512 or 768x512 (width x height), or a ratio such as 3:2 at the model's own area.
        guidance: Guidance scale of the model.
        negative_prompt: What guidance leads away from.
        scheduler: euler, euler-karras, ddim, dpm, dpm-karras, or any of diffusers with options of its own, such as
            UniPCMultistep,solver_order=3, in place of its own.
        call: Any other argument of the pipeline's call, such as true_cfg_scale=4 or eta=.5 (may be repeated).
        preview: What early looks see: auto, full, tiny[=DIR], small[=PIXELS] or linear (finished images: always full).
        diversity: Push candidates of a prompt apart: negtome, repel (FLUX, SDXL).
        diversity_options: Its parameters, such as merging_alpha=1.2,t_end=800.
        cache: Reuse parts of denoiser calls: FirstBlock, TaylorSeer, Mag, PAB, Faster or Sea, with options such as
            FirstBlock,threshold=.1.
        draft_cache: The same for candidates on their way to a look only; finished images are made again without.
        look_frames: Of videos, the frames that are judged: first,middle,last or 0,8.
        max_batch: Most candidates in one batch (halved when memory runs out).
    """

    model: str = "shapes"
    steps: int | None = None
    size: str | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    scheduler: str | None = None
    call: tuple[str, ...] = ()
    preview: str | None = None
    diversity: str | None = None
    diversity_options: str | None = None
    cache: str | None = None
    draft_cache: str | None = None
    look_frames: str | None = None
    max_batch: int | None = None

    def __post_init__(self) -> None:
        check_ranges(steps=(self.steps, 1, MAX_STEPS), max_batch=(self.max_batch, 1, MAX_CANDIDATES))
        check_characters(self.negative_prompt or "", "the negative prompt")
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
        if self.cache is not None and self.draft_cache is not None:
            raise ValueError("--cache is for all calls, --draft-cache for those before the looks; give one of them")
        if (cache := self.cache or self.draft_cache) is not None:
            from ttsnap.pipelines.caches import read_cache

            read_cache(cache)
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """What was given for the pipeline's call and the sampler, by the names that these have for it."""
        given = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "negative_prompt": self.negative_prompt,
            "scheduler": self.scheduler,
            "max_batch": self.max_batch,
            "look_frames": parse_frames(self.look_frames),
        }
        return (
            {key: value for key, value in given.items() if value is not None}
            | read_size(self.size)
            | read_call(self.call)
        )


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Loading, CallSettings):
    """The model, the arguments of its call, and how it is loaded: `CallSettings` and `Loading`.

    Attributes:
        devices: Several devices for one search, such as 0,1,2,3 (GPUs by number) or cpu,cpu; each gets the model.
        reward_device: Where rewards run, such as cuda:1 or cpu (default: with the model); each: on each of --devices.
        reward_timeout: Seconds in which a reward has to answer about a batch (default: it may take for ever).
    """

    devices: str | None = None
    reward_device: str | None = None
    reward_timeout: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_timeout(self.reward_timeout)
        if self.devices is not None:
            from ttsnap.pipelines.loading import read_devices

            if self.device_map:
                raise ValueError(
                    "--devices are for copies of a model, --device-map for one model; leave one of them out"
                )
            first = read_devices(self.devices)[0]
            if self.device not in (None, first):
                raise ValueError(
                    f"--devices begins with {first}, where the model runs; leave out --device {self.device}"
                )
        self.check()

    def keywords(self, pictures: Pictures) -> dict[str, Any]:
        """Keywords of `prepare` and `load_sampler`, but for the model itself."""
        loading = {field.name: getattr(self, field.name) for field in fields(Loading)}
        given = self.arguments() | ({"pictures": pictures} if pictures else {})
        own = {name: getattr(self, name) for name in ("preview", "cache", "draft_cache", "devices")}
        return loading | given | own | {"diversity": self._negtome()}

    def sampler(self, prompt: str, pictures: Pictures) -> Sampler:
        """Load the model."""
        from ttsnap.live.session import load_sampler

        return load_sampler(self.model, prompt=prompt, **self.keywords(pictures))

    def load_rewards(self, named: str, device: Any) -> dict[str, Any]:
        """Rewards by name, on the device that is asked for, else on this one."""
        from ttsnap import rewards
        from ttsnap.pipelines.loading import find_device

        place = find_device(self.reward_device) if self.reward_device else device
        return rewards.load(named, place, self.reward_timeout)

    def _negtome(self) -> Any:
        """How candidates are pushed apart; None if they are not."""
        from ttsnap.pipelines.negtome import parse

        return parse(self.diversity, self.diversity_options)

    def key(self) -> dict[str, Any]:
        """What decides the images, as a JSON object, with the contents of the files that are named."""
        options = {key: value for key, value in self.arguments().items() if key != "max_batch"}
        negtome = self._negtome()
        found = {
            "model": self.model,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "preview": self.preview,
            "cache": self.cache,
            "draft_cache": self.draft_cache,
            "attention": self.attention,
            **options,
        }
        found["diversity"] = negtome.to_dict() if negtome else None
        found |= {part.name: getattr(self, part.name) or None for part in fields(Additions)}
        files = {f"model {self.model}": self.model, f"config {self.config}": self.config, **self.sources()}
        found["contents"] = contents({name: Path(path) for name, path in files.items() if path})
        return found


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What is looked for, and at what cost.

    Attributes:
        reward: Reward (see `ttsnap rewards`), module:function, or several by commas (rank sum).
        weights: Weights of several rewards, such as 1,.5 (default: rank sum).
        combine: How several rewards become one: rank-sum, weighted-sum, minimum, or such as "hpsv2 where vqascore>=.8".
        report_reward: Held-out reward(s): judge finished images only, warn when they part from --reward (default: one
            that is here already, if there is one); none.
        policy: best-of-n, halving, branching, svdd, steering, evosearch ... (docs/searches.md), or a policy FILE.json
            (default: tuned, else halving).
        candidates: Candidates started per prompt (default: 32; 8 for shapes).
        budget: Or what a prompt may cost: 200NFE, 2000TFLOP, 50GFLOP or 30s.
        rungs: Steps at which to look, such as 3,7,12.
        keep: Share that survives each look, such as .4,.4,.5.
        stop_at: Reward that is good enough: search four candidates at a time until one has it.
        different: With --top: the best images that are also different, chosen while candidates are pruned, too.
        seed: Seed of the first candidate; the others count up.
    """

    reward: str | None = None
    weights: str | None = None
    combine: str | None = None
    report_reward: str | None = None
    policy: str | None = None
    candidates: int | None = None
    budget: str | None = None
    rungs: str | None = None
    keep: str | None = None
    stop_at: float | None = None
    different: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(candidates=(self.candidates, 1, MAX_CANDIDATES), seed=(self.seed, 0, MAX_SEED))
        if self.budget is not None and self.candidates is not None:
            raise ValueError("give --budget or --candidates, not both")
        if not any(vars(self).values()):
            return
        from ttsnap import rewards
        from ttsnap.core.cost import Budget
        from ttsnap.core.ranking import read_rule
        from ttsnap.live.reporting import AUTO, NONE

        if self.budget is not None:
            Budget.parse(self.budget)
        names = rewards.names_of(self.reward) if self.reward is not None else ["the model's own"]
        weights = read_weights(self.weights)
        if weights is not None or self.combine is not None:
            read_rule(self.combine, names, weights)
        if self.report_reward not in (None, AUTO, NONE):
            rewards.names_of(self.report_reward)
        self.chosen_policy()

    def chosen_policy(self) -> tuple[Policy | None, int | None]:
        """The policy that is asked for, None where it depends on model or steps; and the number of steps it says."""
        if self.rungs is None and self.keep is None:
            from ttsnap import policies
            from ttsnap.core.cost import Budget

            budget = Budget.parse(self.budget) if self.budget else None
            return (None, None) if self.policy is None else policies.read(self.policy, budget)
        if self.policy not in (None, "halving"):
            raise ValueError(f"--rungs and --keep belong to the policy halving, not to {self.policy}")
        return halving(self.rungs, self.keep), None

    def keywords(self) -> dict[str, Any]:
        """Keywords of `ttsnap.live.session.prepare`, but for the rewards: what is searched with, and at what cost."""
        return {
            "budget": self.budget,
            "candidates": self.candidates,
            "policy": self.policy if self.rungs is None else self.chosen_policy()[0],
            "stop_at": self.stop_at,
            "combine": self.combine,
            "weights": read_weights(self.weights),
        }

    def prepare(
        self, model: ModelSettings, prompt: str, pictures: Pictures, fixed: int | None, top: int = 1
    ) -> Session:
        """Load everything that a search needs.

        Args:
            model: the model.
            prompt: a prompt to count and calibrate with.
            pictures: that the pipeline is given.
            fixed: candidates that a run which is resumed has settled on.
            top: images that are wanted.
        """
        from ttsnap.core.cost import Budget
        from ttsnap.live.reporting import AUTO
        from ttsnap.live.session import prepare

        asked = self.keywords()
        if fixed and self.budget and Budget.parse(self.budget).unit == "s":  # which are not to be measured again
            asked |= {"budget": None, "candidates": fixed}
        session = prepare(
            model.model,
            reward=self.reward,
            different=top if self.different else 0,
            prompt=prompt,
            report=self.report_reward or AUTO,
            reward_device=model.reward_device,
            reward_timeout=model.reward_timeout,
            **asked,
            **model.keywords(pictures),
        )
        session.budget = self.budget
        session.candidates = fixed or session.candidates
        return session

    def key(self) -> dict[str, Any]:
        """What decides the result, as a JSON object, with the contents of the files that are named."""
        from ttsnap import policies
        from ttsnap.live.reporting import AUTO, NONE

        policy, steps = self.chosen_policy()
        found = asdict(self) | {"policy": policies.to_dict(policy) if policy else self.policy}
        del found["rungs"], found["keep"]
        found["steps_of_policy"] = steps
        report = None if self.report_reward in (AUTO, NONE) else self.report_reward
        found["contents"] = reward_contents(self.reward, report)
        return found


@dataclass(frozen=True, kw_only=True)
class LiveTuningSettings:
    """What is tuned by searching, not on a recording.

    Attributes:
        policy: Live: the policy to begin with, by name or as a FILE.json; it says how many rungs there are.
        prompts: Live: a file with prompts, or a list that comes with a model; half of them are held out.
        prompt_range: Live: part of them, such as 0:60.
        reward: Live: reward(s) to search by (default: the model's own).
        try_steps: Live: numbers of steps to choose from, such as 6,12,20; the policy file then says how many.
    """

    policy: str | None = None
    prompts: str | None = None
    prompt_range: str | None = None
    reward: str | None = None
    try_steps: str | None = None

    def given(self) -> list[str]:
        """The options that were given."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]


def pictures_key(pictures: Pictures) -> dict[str, Any]:
    """What of pictures decides the result, as a JSON object, with the contents of the models that read them."""
    return pictures.settings() | {
        "contents": contents({name: Path(source) for name, source in pictures.sources().items()})
    }


def resume_key(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides a result, as a JSON object; a run is resumed only where it is the same."""
    merged: dict[str, Any] = {"contents": {}}
    for part in parts:
        merged |= {name: value for name, value in part.items() if name != "contents" and value is not None}
        merged["contents"] |= part.get("contents", {})
    return dict(json.loads(json.dumps(merged)))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two keys, in words."""
    names = dict.fromkeys([*before, *now])
    found = [name for name in names if name != "contents" and before.get(name) != now.get(name)]
    old, new = before.get("contents", {}), now.get("contents", {})
    return found + [f"the content of {name}" for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]


def reward_contents(*named: str | None) -> dict[str, str]:
    """Fingerprints of the weights, runs and code that decide what rewards by name say."""
    from ttsnap import rewards

    return contents({name: path for text in named if text is not None for name, path in rewards.files_of(text).items()})


def contents(files: Mapping[str, Path]) -> dict[str, str]:
    """A fingerprint of each file or directory that is there, by what it is."""
    return {name: fingerprint(path) for name, path in files.items() if path.exists()}


def fingerprint(path: Path) -> str:
    """Changes with the content of a file, or of the files of a directory.

    Of files of more than a MiB, which hold weights, the size and pieces all over them count.
    """
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        found.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as opened:
            if size <= SAMPLES * SAMPLE:
                found.update(opened.read())
                continue
            for number in range(SAMPLES):
                opened.seek(number * (size - SAMPLE) // (SAMPLES - 1))
                found.update(opened.read(SAMPLE))
    return found.hexdigest()


# From text to values.


def check_ranges(**options: tuple[int | None, int, int]) -> None:
    """Raise ValueError about the first option (value, least, most) that is given and out of range."""
    for name, (value, least, most) in options.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        if value is not None and value > most:
            raise ValueError(f"--{name.replace('_', '-')} must be at most {most}, got {value}")


def read_numbers(text: str, name: str, example: str) -> tuple[float, ...]:
    """Numbers separated by commas; the option's name and an example serve the error message."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} takes numbers separated by commas, such as {example}, got {text!r}") from None


def read_weights(text: str | None) -> tuple[float, ...] | None:
    """Weights of several rewards, such as `1,.5`."""
    if text is None:
        return None
    weights = read_numbers(text, "--weights", "1,.5")
    if not any(weights) or not all(abs(weight) < float("inf") for weight in weights):
        raise ValueError(f"--weights takes finite numbers that are not all 0, got {text!r}")
    return weights


def read_size(text: str | None) -> dict[str, Any]:
    """Height and width of `512` or `768x512`; of `3:2` the aspect ratio."""
    if text is None:
        return {}
    if ":" in text:
        read_ratio(text)
        return {"aspect_ratio": text}
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(
            f"--size takes pixels such as 512 or 768x512 (width x height), or a ratio such as 3:2, got {text!r}"
        )
    if max(map(int, parts)) > LONGEST_SIDE:
        raise ValueError(f"--size is at most {LONGEST_SIDE} pixels a side, got {text}")
    return {"width": int(parts[0]), "height": int(parts[-1])}


def read_call(arguments: Iterable[str]) -> dict[str, Any]:
    """Arguments of the pipeline's call, such as `true_cfg_scale=4`; values are JSON, or else text."""
    found: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--call takes an argument such as true_cfg_scale=4, got {argument!r}")
        found[name] = read_value(value)
    return found


def halving(rungs: str | None, keep: str | None) -> SuccessiveHalving:
    """Successive halving at these rungs, such as `3,7,12`, with these keep ratios, such as `.4,.4,.5`."""
    if rungs is None:
        raise ValueError("--keep needs --rungs, such as --rungs 3,7,12 --keep .4,.4,.5")
    from ttsnap.policies import SuccessiveHalving

    steps = tuple(int(value) if value == int(value) else value for value in read_numbers(rungs, "--rungs", "3,7,12"))
    ratios = read_numbers(keep, "--keep", ".4,.4,.5") if keep is not None else None
    return SuccessiveHalving(steps, ratios)


__all__: Sequence[str] = [
    "ModelSettings",
    "SearchSettings",
    "changes",
    "fingerprint",
    "pictures_key",
    "resume_key",
    "reward_contents",
]
