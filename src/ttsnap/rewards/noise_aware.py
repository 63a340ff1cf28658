"""A reward that judges each x0 estimate with weights trained for its noise level."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ttsnap.rewards.registry import RUN, names_of
from ttsnap.rewards.trainable import adapt, load_trainable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ttsnap.rewards.registry import Spec

FORMAT, VERSION = "ttsnap-training-run", 1


class NoiseAwareReward:
    """All levels of a run around one clean reward; a look swaps tensors by reference and copies nothing.

    A level's weights go to the reward's device at the first look that needs them, and stay there. A look at noise level
    sigma is served by the weights of the nearest level (the cleaner of two as near); below the last level's sigma, and
    so for finished images, the clean reward serves.
    """

    def __init__(
        self,
        reward: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        levels: Mapping[float, Mapping[str, Tensor]],
        clean_name: str = "",
    ) -> None:
        """Check that every level has exactly these parameters.

        Args:
            reward: the clean reward, with new adapters where the levels are adapters.
            parameters: those of its parameters that the levels replace, by name.
            levels: sigma -> tensors by name.
            clean_name: name of the clean reward; recordings keep both under it.

        Raises:
            ValueError: no level, or tensors that do not fit.
        """
        if not levels:
            raise ValueError("a noise-aware reward needs the weights of at least one noise level")
        self.reward = reward.eval().requires_grad_(False)
        self.clean_name = clean_name
        self.sigmas = tuple(sorted(levels))
        self._parameters = list(parameters.values())
        self._weights: dict[float | None, list[Tensor]] = {None: [p.data for p in self._parameters]}
        self._current: float | None = None
        for sigma, tensors in levels.items():
            check_fit(tensors, parameters, f"the weights of sigma {sigma:g}")
        self._levels = {sigma: [tensors[name] for name in parameters] for sigma, tensors in levels.items()}
        # What a reward keeps of prompts may depend on parameters that it does not train: then each level has its own.
        trained = re.compile(str(getattr(reward, "trained", ".*")))
        apart = hasattr(reward, "texts") and not all(trained.fullmatch(name) for name in parameters)
        self._texts: dict[float | None, dict[str, Tensor]] | None = {} if apart else None

    def level(self, sigma: float) -> float | None:
        """The level that serves a look at noise level `sigma`; None for the clean reward."""
        if sigma < self.sigmas[0] * (1 - 1e-6):
            return None
        return min(self.sigmas, key=lambda known: abs(known - sigma))

    def reads(self, sigma: float) -> float | None:
        """Which reading of a prompt a look needs: a level's own, or the clean reward's (None), which most share."""
        return None if self._texts is None else self.level(sigma)

    def __call__(self, images: Tensor, prompts: Sequence[str], *, sigma: float) -> Tensor:
        """Rewards [n] of images [n, 3, h, w] in 0..1, which are x0 estimates at noise level `sigma`."""
        self._switch(self.level(sigma))
        answer: Tensor = self.reward(images, prompts, sigma=sigma)
        return answer

    def _switch(self, level: float | None) -> None:
        if level == self._current:
            return
        if level is not None and level not in self._weights:
            made = zip(self._levels.pop(level), self._weights[None], strict=True)
            self._weights[level] = [tensor.to(clean.device, clean.dtype) for tensor, clean in made]
        if self._texts is not None:
            self._texts[self._current] = self.reward.texts  # type: ignore[assignment]
            self.reward.texts = self._texts.get(level, {})  # type: ignore[assignment]
        for parameter, tensor in zip(self._parameters, self._weights[level], strict=True):
            parameter.data = tensor
        self._current = level


def check_fit(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError unless names and shapes agree."""
    if different := sorted(tensors.keys() ^ parameters.keys()):
        raise ValueError(f"{what} do not fit the reward: {different[0]} is in one of them only")
    for name, tensor in tensors.items():
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"{what} do not fit the reward: {name} has shape {list(tensor.shape)}, not "
                f"{list(parameters[name].shape)}"
            )


def read_run(folder: str | Path) -> dict[str, Any]:
    """What a run says of itself: reward, method, levels, versions.

    Raises:
        ValueError: it is no run, or its description is damaged.
    """
    path = Path(folder) / RUN
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a training run (it has no {RUN})") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path} does not describe a training run")
    if data.get("version") != VERSION:
        raise ValueError(f"{path} has version {data.get('version')}; this ttsnap reads {VERSION}")
    if not {"reward", "method", "rank", "alpha", "levels"} <= data.keys():
        raise ValueError(f"{path} does not describe a training run")
    return data


def load_noise_aware(folder: str | Path, device: Any = "cpu", clean: Spec | None = None) -> NoiseAwareReward:
    """The noise-aware reward of a run, with all levels trained so far.

    Args:
        folder: the run that `ttsnap train` wrote.
        device: where it takes its images.
        clean: the clean reward, if its name is to be checked, or its weights are not where the run found them.

    Raises:
        ValueError: no run, no level yet, another clean reward, or weights that do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    run = read_run(folder)
    (trained_from,) = names_of(run["reward"])
    if clean is not None and clean.name != trained_from:
        raise ValueError(f"{folder} was trained from the reward {trained_from}, not from {clean.name}")
    if not run["levels"]:
        raise ValueError(f"{folder} has no trained level yet")
    levels = {}
    for level in run["levels"]:
        path = folder / level["file"]
        try:
            levels[float(level["sigma"])] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"weights {path} cannot be read: {error}") from error
    reward = load_trainable(f"{clean.clean}={clean.path}" if clean and clean.path else run["reward"], device)
    return NoiseAwareReward(reward, adapt(reward, run["method"], run["rank"], run["alpha"]), levels, trained_from)
