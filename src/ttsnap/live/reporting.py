"""A held-out reward beside the one that a search optimises, to notice when the two part (reward hacking).

It judges finished images only and steers nothing, so it is in neither the budget nor the cost of a search; what it took
is told apart. The two *part* on a prompt when the winner's held-out reward is below the median held-out reward of the
finished images of that prompt: then picking one of them blindly would have done at least as well by it. For a held-out
reward that has nothing to do with the optimised one that happens on half of the prompts, so one prompt says little and
many say much. With `compare`, best-of-N's images are among them: more images, and not chosen by any early look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SECONDS = ("imagereward", "clipscore", "pickscore", "hpsv2.1", "hpsv2")  # the cheapest first; each reads the prompt
Candidate = tuple[int, bool]  # its seed, and whether a fork began it
AUTO, NONE = "auto", "none"  # what may be said in a held-out reward's place


def second_reward(model: str, names: Sequence[str]) -> str | None:
    """A reward that can be held out without a download, beside those that a search optimises; None if none is at hand.

    Of an embedded model its exact checker; else the cheapest published reward of other weights than theirs that lies in
    the hub's cache.

    Args:
        model: its name.
        names: of the rewards that are optimised.
    """
    from ttsnap.pipelines.models import MODELS
    from ttsnap.rewards import REWARDS
    from ttsnap.rewards.sources import SOURCES

    guides = {name.partition("+")[0] for name in names}
    if model in MODELS:
        own = MODELS[model].report
        return own if own in REWARDS and own not in guides else None
    taken = {SOURCES[name].repo for name in guides if name in SOURCES}
    return next((name for name in SECONDS if SOURCES[name].repo not in taken and SOURCES[name].at_hand()), None)


@dataclass(frozen=True)
class HeldOut:
    """What a held-out reward says of one prompt.

    Attributes:
        name: of the reward.
        reward: of the winner.
        median: of all finished images.
        images: finished images that were judged.
        best_of_n: of best-of-N's choice; None if it was not run.
        tflop: of these looks and of reading the prompt, which are not in the cost of the search.
        perfect: what a picture gets that shows all that is asked for; None where the reward has no such mark.
    """

    name: str
    reward: float
    median: float
    images: int
    best_of_n: float | None
    tflop: float
    perfect: float | None = None

    @property
    def missed(self) -> bool:
        """Whether the winner does not show all that is asked for."""
        return self.perfect is not None and self.reward < self.perfect

    @property
    def parted(self) -> bool | None:
        """Whether the winner is worse than the median; None if there is nothing to compare it with."""
        return self.reward < self.median if self.images > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self) | {"parted": self.parted, "missed": self.missed}


def report(
    rewards: Mapping[str, Any],
    tflop: Mapping[str, tuple[float, float]],
    prompt: str,
    finished: Mapping[Candidate, np.ndarray],
    winner: Candidate,
    best_of_n: Candidate | None,
    device: Any = "cpu",
    batch: int = 32,
) -> list[HeldOut]:
    """What held-out rewards say of a prompt's finished images.

    Args:
        rewards: by name.
        tflop: of one look and of reading a prompt, by name.
        prompt: the prompt.
        finished: images [h, w, 3] as uint8, by seed and whether a fork began them.
        winner: the search's choice.
        best_of_n: best-of-N's choice.
        device: where the rewards take their images.
        batch: most images in one look.

    Raises:
        ValueError: a reward was not finite; names it, prompt and seed.
    """
    import torch

    from ttsnap.live.judging import judge

    candidates = sorted(finished)
    reports = []
    for name, reward in rewards.items():
        values = []
        for start in range(0, len(candidates), batch):
            images = np.stack([finished[candidate] for candidate in candidates[start : start + batch]])
            tensor = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
            values.append(judge(name, reward, tensor, [prompt] * len(images), 0.0))
        judged = dict(zip(candidates, np.concatenate(values).tolist(), strict=True))
        for (seed, _), value in judged.items():
            if not np.isfinite(value):
                raise ValueError(f"the reward {name} returned {value:g} for prompt {prompt!r}, seed {seed}, finished")
        median = float(np.median(list(judged.values())))
        other = None if best_of_n is None else judged[best_of_n]
        look, text = tflop[name]
        paid, perfect = look * len(candidates) + text, getattr(reward, "perfect", None)
        reports.append(HeldOut(name, judged[winner], median, len(candidates), other, paid, perfect))
    return reports


def warning(reports: Sequence[Sequence[HeldOut]], optimised: Sequence[str]) -> str | None:
    """One sentence if rewards parted on some of these prompts."""
    parts = []
    for of_reward in zip(*reports, strict=True):
        compared = [held_out for held_out in of_reward if held_out.parted is not None]
        parted = sum(bool(held_out.parted) for held_out in compared)
        if parted:
            parts.append(f"{of_reward[0].name} (on {parted} of {len(compared)} prompts)")
    if not parts:
        return None
    return (
        f"the winner by {', '.join(optimised)} is worse than the median finished image by the held-out reward "
        f"{', '.join(parts)}: they may part (reward hacking)"
    )
