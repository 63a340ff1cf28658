"""A judge of features for any model: from a recording that keeps what the denoiser knows to a head on it.

Where to read is searched: a head is tried on each place that was recorded, alone and beside the x0 estimate. The one
whose ranking agrees best with that of the finished images, on prompts that it was not fitted to, is trained to the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttsnap.core.grid import FloatArray, IntArray
from ttsnap.core.ranking import kendall_tau, mean_and_error
from ttsnap.files.provenance import versions
from ttsnap.files.storage import write_json
from ttsnap.pipelines.features import X0, Place
from ttsnap.recordings.features import MOST_WORDS, Reader
from ttsnap.recordings.recording import Recording
from ttsnap.rewards.feature_head import FeatureHead, HeadConfig, save_head
from ttsnap.rewards.registry import HEAD
from ttsnap.training.heads import Trails, foretell, train_head

EVALUATION = "evaluation.json"
CHECKS = 8  # times that a training is looked at
TRIAL = 0.2  # part of the updates that a trial of a place gets
CLEAN = (0.6, 0.7, 0.8, 0.9, 1.0), (0.75, 0.62, 0.43, 0.22, 0.02)  # share of noise, Kendall tau of the clean reward


@dataclass(frozen=True)
class JudgeSettings:
    """How a judge of features is trained.

    Attributes:
        reward: to foretell; None: the one that was recorded.
        held_out: prompts from the end of the recording that only the report is made of; None: a fifth.
        place: module to read, or `x0`; None: the best one, which is searched.
        updates: of AdamW.
        batch: candidates in an update.
        learning_rate: at the top.
        preference: scale of the ranking loss beside the squared error.
        width: of the head.
        depth: of the head, blocks.
        seed: of weights and order.
    """

    reward: str | None = None
    held_out: int | None = None
    place: str | None = None
    updates: int = 2000
    batch: int = 128
    learning_rate: float = 2e-3
    preference: float = 1.0
    width: int = 96
    depth: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("held_out", "updates", "batch", "width", "depth"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (self.learning_rate > 0 and self.preference >= 0 and self.seed >= 0):
            raise ValueError("learning_rate must be above 0, preference and seed at least 0")
        if self.width % HeadConfig.heads:
            raise ValueError(
                f"width must be a multiple of {HeadConfig.heads}, the heads of attention, got {self.width}"
            )


@dataclass(frozen=True)
class Level:
    """What was measured on held-out prompts after one call; clean: of the clean reward on x0 pictures, if recorded."""

    call: int
    sigma: float
    judge: float
    judge_error: float
    clean: float | None
    clean_error: float | None
    served: bool


@dataclass(frozen=True)
class JudgeReport:
    """What came of a training.

    Attributes:
        out: where the head is.
        reward: that it foretells.
        places: that it reads.
        trials: mean Kendall tau of each that was tried, on prompts that it was not fitted to.
        levels: Kendall tau by call on held-out prompts.
        prompts: fitted to, chosen by, held out.
        parameters: of the head.
    """

    out: Path
    reward: str
    places: tuple[str, ...]
    trials: dict[str, float]
    levels: tuple[Level, ...]
    prompts: tuple[int, int, int]
    parameters: int


def train_judge(
    recording: str | Path,
    out: Path,
    settings: JudgeSettings = JudgeSettings(),
    *,
    device: Any = "cpu",
    on_start: Callable[[int], None] | None = None,
    on_updates: Callable[[int], None] | None = None,
) -> JudgeReport:
    """Train a head on a recording's features and save it; it is then a reward: `REWARD+OUT`.

    Args:
        recording: made with `ttsnap record --reward REWARD --features`.
        out: directory to write.
        settings: how.
        device: where to compute.
        on_start: called with the number of updates to come.
        on_updates: called with the number of updates just made.

    Raises:
        ValueError: no features or too few prompts in the recording, an unknown reward or place, or `out` holds a head.
    """
    source = Recording.open(recording)
    reader = Reader(source)
    name = _reward(source, settings.reward)
    if (out / HEAD).exists():
        raise ValueError(f"{out} holds a head already; remove it, or choose another output")
    fit, choose, held = _split(source, settings.held_out)
    combinations = _combinations(reader.kept.places, settings.place)
    tried = combinations if len(combinations) > 1 else []
    trial = replace(settings, updates=max(1, round(TRIAL * settings.updates)))
    if on_start:
        on_start(len(tried) * trial.updates + settings.updates)

    def data(places: Sequence[Place], prompts: IntArray) -> Trails:
        return _trails(reader, name, places, prompts)

    trials: dict[str, float] = {}
    for places in tried:
        _, found = _fit(data(places, fit), data(places, choose), trial, device, on_updates)
        trials[_name(places)] = float(np.nanmean(found))
    best = max(combinations, key=lambda places: trials.get(_name(places), 0.0))
    head, found = _fit(data(best, fit), data(best, choose), settings, device, on_updates)
    clean = source.clean[reader.prompts][..., source.rewards.index(name)]
    noise = shares_of_noise(source.sigmas)[np.asarray(reader.kept.calls) - 1]
    served = _served(found, _early(clean[choose], reader.kept.calls), noise)
    levels = _levels(head, data(best, held), clean[held], reader.kept.calls, served)
    parameters = sum(p.numel() for p in head.parameters())
    counts = (len(fit), len(choose), len(held))
    report = JudgeReport(out, name, tuple(p.module for p in best), trials, levels, counts, parameters)
    sigma = float(source.sigmas[reader.kept.calls[served] - 1])
    notes = {"trained": {"recording": str(recording), "settings": asdict(settings), "trials": trials}}
    out.mkdir(parents=True, exist_ok=True)
    write_json(asdict(report) | {"out": str(out), "versions": versions()}, out / EVALUATION)
    save_head(head.cpu(), out, reward=name, places=best, sigma=sigma, **notes)  # last: a head is a whole training
    return report


def _reward(source: Recording, name: str | None) -> str:
    known = ", ".join(source.rewards)
    if name is None and len(source.rewards) > 1:
        raise ValueError(f"{source.path} has several rewards; choose one with --reward: {known}")
    name = name or source.rewards[0]
    if name not in source.rewards:
        raise ValueError(f"{source.path} has no reward {name!r}; it has {known}")
    return name


def _split(source: Recording, held_out: int | None) -> tuple[IntArray, IntArray, IntArray]:
    """Places of prompts among the recorded ones: to fit, to choose by, to report on."""
    count = len(source.recorded())
    held = max(2, round(0.2 * count)) if held_out is None else held_out
    rest = count - held
    choose = max(2, round(rest / 6))
    if held < 1 or rest - choose < 2 or source.shape[1] < 2:
        raise ValueError(
            f"a judge needs prompts to fit, to choose by and to hold out, of 2 candidates or more each: {count} are "
            f"recorded, {held} held out; record at least 8, better some hundreds"
        )
    everything = np.arange(count)
    return everything[: rest - choose], everything[rest - choose : rest], everything[rest:]


def _combinations(places: Sequence[Place], wanted: str | None) -> list[tuple[Place, ...]]:
    """What heads are tried on: each place alone, and each module beside x0."""
    modules, x0 = [p for p in places if p.module != X0], tuple(p for p in places if p.module == X0)
    if wanted is not None:
        chosen = [p for p in places if p.module == wanted]
        if not chosen:
            raise ValueError(f"{wanted!r} was not recorded; there are {', '.join(p.module for p in places)}")
        return [tuple(chosen)]
    together = [(place, *x0) for place in modules] if x0 else []
    return [*together, *((place,) for place in modules), *([x0] if x0 else [])]


def _name(places: Sequence[Place]) -> str:
    return " + ".join(place.module for place in places)


def _trails(reader: Reader, name: str, places: Sequence[Place], prompts: IntArray) -> Trails:
    source = reader.recording
    cells = torch.from_numpy(reader.cells(places, prompts))
    states, counts = reader.words(prompts)
    mask = torch.arange(states.shape[1])[None] < torch.from_numpy(counts)[:, None]
    final = source.clean[reader.prompts[prompts]][:, :, -1, source.rewards.index(name)]
    targets = torch.from_numpy(final.astype(np.float32))[..., None]
    texts = tuple(source.prompts[p] for p in reader.prompts[prompts])
    sigmas = np.asarray([source.sigmas[call - 1] for call in reader.kept.calls])
    return Trails(texts, torch.from_numpy(states), mask, np.arange(len(prompts)), cells, targets, sigmas)


def _fit(
    data: Trails, chosen_by: Trails, settings: JudgeSettings, device: Any, tell: Callable[[int], None] | None
) -> tuple[FeatureHead, FloatArray]:
    """The head that agreed best on the prompts to choose by, and Kendall tau [prompts, looks] there."""
    grid = math.isqrt(data.cells.shape[3])
    sizes = HeadConfig(data.cells.shape[-1], data.words.shape[-1], grid, MOST_WORDS, settings.width, settings.depth)
    best: list[Any] = [-2.0, None, None]
    every = max(1, settings.updates // CHECKS)

    def look(update: int, losses: dict[str, float], head: FeatureHead) -> None:
        if tell:
            tell(1)
        if update % every == 0 or update == settings.updates:
            found = _tau(head.eval(), chosen_by)
            if (mean := float(np.nan_to_num(np.nanmean(found)))) > best[0]:
                best[:] = [mean, {k: v.clone() for k, v in head.state_dict().items()}, found]

    head = train_head(
        [data],
        sizes,
        updates=settings.updates,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        preference=settings.preference,
        seed=settings.seed,
        device=device,
        on_update=look,
    )
    head.load_state_dict(best[1])
    return head, best[2]


def _tau(head: FeatureHead, data: Trails) -> FloatArray:
    """Kendall tau [prompts, looks] of what a head foretells with the rewards of the finished images."""
    values, final = foretell(head, data), data.targets[..., 0].numpy().astype(float)
    return np.stack([kendall_tau(values[..., look], final) for look in range(values.shape[2])], axis=1)


def _early(clean: FloatArray, calls: Sequence[int]) -> FloatArray:
    """Kendall tau [prompts, looks] of the clean reward of x0 pictures; NaN where it was not recorded."""
    final = clean[:, :, -1].astype(float)
    looks = [clean[:, :, call - 1].astype(float) for call in calls]
    nothing = np.full(len(clean), np.nan)
    return np.stack([kendall_tau(x, final) if np.isfinite(x).all() else nothing for x in looks], axis=1)


def shares_of_noise(sigmas: FloatArray) -> FloatArray:
    """Share of noise, 1 to 0, of each noise level, which of flow models is that share and of others a ratio."""
    return sigmas / (1 + sigmas) if np.max(sigmas) > 1 else np.asarray(sigmas)


def _served(judge: FloatArray, clean: FloatArray, noise: FloatArray) -> int:
    """The last look that the head serves: from where on the clean reward is better.

    Where that was not asked, it is taken to foretell what the clean rewards of the embedded levels do at this share of
    noise [looks] (docs/judges.md): a weak judge that serves late is worse than none.
    """
    known = _mean(clean)
    gain = np.nanmean(judge, axis=0) - np.where(np.isnan(known), np.interp(noise, *CLEAN), known)
    return int(np.argmax(np.cumsum(np.nan_to_num(gain))))


def _mean(values: FloatArray) -> FloatArray:
    known = np.isfinite(values).any(0)
    return np.where(known, np.nanmean(np.where(known, values, 0.0), axis=0), np.nan)


def _levels(head: FeatureHead, data: Trails, clean: FloatArray, calls: Sequence[int], served: int) -> tuple[Level, ...]:
    """Kendall tau and its standard error by look."""
    judge, early = _tau(head, data), _early(clean, calls)
    made = []
    for look, call in enumerate(calls):
        own, theirs = mean_and_error(judge[:, look]), mean_and_error(early[:, look])
        made.append(Level(call, float(data.sigmas[look]), own[0] or 0.0, own[1] or 0.0, *theirs, served=look <= served))
    return tuple(made)
