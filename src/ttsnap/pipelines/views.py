"""What a look can see of candidates: pictures, made when a reward asks for them, or features, which cost nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ttsnap.core.grid import BoolArray
    from ttsnap.pipelines.features import Features
    from ttsnap.pipelines.sampler import Sampler, Trajectories


FLAT, BLACK = 1.5 / 255, 8.5 / 255  # largest spread of a picture of one colour; brightest value of a black one


@dataclass
class View:
    """Candidates as a look after their last call sees them.

    Attributes:
        sampler: made them, and makes their pictures.
        group: the candidates.
        made: their pictures, once they were asked for; see `images`.
    """

    sampler: Sampler
    group: Trajectories
    made: Tensor | None = None

    def __len__(self) -> int:
        return len(self.group)

    def __getitem__(self, rows: slice | Sequence[int]) -> View:
        """Some of the candidates; pictures that are made stay made."""
        chosen = list(range(len(self))[rows] if isinstance(rows, slice) else rows)
        if chosen == list(range(len(self))):
            return self
        return replace(self, group=self.group.select(chosen), made=None if self.made is None else self.made[chosen])

    @property
    def sigma(self) -> float:
        """Noise level of the x0 estimates; 0 of finished images."""
        last = self.group.step == self.sampler.num_steps
        return 0.0 if last else self.sampler.sigmas[self.group.step - 1]

    @property
    def images(self) -> Tensor:
        """Pictures [n, 3, h, w] in 0..1 (of videos [n, frames, 3, h, w]): of the preview, where it serves this call."""
        if self.made is None:
            self.made = self.sampler.look(self.group)
        return self.made

    @property
    def shown(self) -> Tensor:
        """The part of the pictures that is judged."""
        return self.sampler.shown(self.images)

    def blank(self) -> BoolArray:
        """Whose pictures [n] show nothing: all of one colour, or black."""
        flat = self.shown.flatten(1)
        highest, lowest = flat.amax(1), flat.amin(1)
        found: BoolArray = ((highest - lowest <= FLAT) | (highest <= BLACK)).cpu().numpy()
        return found

    @property
    def features(self) -> Features:
        """What the denoiser knows of them."""
        return self.sampler.features(self.group)


def reads_features(reward: Any, sigma: float) -> bool:
    """Whether a reward judges x0 estimates of this noise level by features, so that it needs no picture."""
    return bool(getattr(reward, "places", None)) and reward.level(sigma) is not None


def need_pictures(rewards: Mapping[str, Any], sigma: float) -> bool:
    """Whether any of the rewards asks for pictures of x0 estimates of this noise level."""
    return not all(reads_features(reward, sigma) for reward in rewards.values())
