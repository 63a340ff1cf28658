"""Noise-aware checkpoints as the TTSnap authors publish them: one full set of weights per step.

    DIR/Ct14.pt                                   as their trainers save them
    DIR/hpsv2|hps/step7.pt                        as their later repository expects them; so for
    DIR/pickscore|pick/..., imagereward|imr/...   the other rewards

The files say which step they are of but not its noise level, so DIR needs a `levels.json` that does:

    {"sigmas": [1.0, 0.98, ...], "counted": "ids"}

`sigmas` are those of the denoiser calls of the sampler they were trained on, the first call's first; steps are counted
either as `ids` from zero (TTSnap: `Ct0.pt` is of the estimate after the first call) or as `calls` (the later
repository: `step7.pt` is of the estimate after seven).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ttsnap.rewards.noise_aware import NoiseAwareReward
    from ttsnap.rewards.registry import Spec

LEVELS = "levels.json"
COUNTED = {"ids": 1, "calls": 0}
"""What is to be added to a step to get the denoiser call."""

FOLDERS = {
    "imagereward": ("imagereward", "imr"),
    "pickscore": ("pickscore", "pick"),
    "hpsv2": ("hpsv2", "hps"),
    "hpsv2.1": ("hpsv2.1",),
}
LAYOUTS = {
    "imagereward": "ImageReward",
    "pickscore": "transformers CLIP",
    "hpsv2": "open_clip",
    "hpsv2.1": "open_clip",
}


def find_steps(folder: str | Path, reward: str) -> dict[int, Path]:
    """The checkpoints of a reward by the step in their names; empty if there are none.

    Raises:
        ValueError: two are of the same step.
    """
    found: dict[int, Path] = {}
    for place in (Path(folder), *(Path(folder) / name for name in FOLDERS.get(reward, ()))):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if match := re.fullmatch(r"(?:Ct|step)(\d{1,4})\.(?:pt|safetensors)", path.name):
                if (step := int(match[1])) in found:
                    raise ValueError(f"{found[step]} and {path} are both of step {step}; take one away")
                found[step] = path
    return found


def folder_of(named: str, reward: str) -> Path:
    """The directory of a reward's checkpoints, which is downloaded where it names a hub repository; see `sources`."""
    from ttsnap.rewards.sources import checkpoints_folder

    return checkpoints_folder(reward, named, ["Ct*", LEVELS, *(f"{name}/*" for name in FOLDERS.get(reward, ()))])


def read_levels(folder: str | Path) -> tuple[list[float], str]:
    """Sigmas and way of counting that `levels.json` in a folder tells.

    Raises:
        ValueError: it is not there, or says something else.
    """
    path = Path(folder) / LEVELS
    example = '{"sigmas": [1.0, 0.98, ...], "counted": "ids"}'
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds noise-aware checkpoints, but not which noise levels they are of: write {path} with the "
            f"sigmas of the calls they were trained on, and whether steps are `ids` from zero or `calls`: {example}"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    sigmas = data.get("sigmas") if isinstance(data, dict) else None
    numbers = isinstance(sigmas, list) and all(type(sigma) in (int, float) and sigma > 0 for sigma in sigmas)
    if not sigmas or not numbers or set(data) - {"sigmas", "counted"} or data.get("counted") not in COUNTED:
        raise ValueError(f"{path} must look like {example}, with counted one of {', '.join(COUNTED)}")
    return [float(sigma) for sigma in sigmas], str(data["counted"])


def load_published(
    folder: str | Path,
    clean: Spec,
    device: Any = "cpu",
    *,
    sigmas: Sequence[float] | None = None,
    counted: str | None = None,
) -> NoiseAwareReward:
    """The noise-aware reward that the checkpoints in a folder make; weights are read when a look needs them.

    Args:
        folder: see above.
        clean: the clean reward, which serves finished images.
        device: where it takes its images.
        sigmas: of each denoiser call of the sampler they were trained on (default: as `levels.json` says).
        counted: whether steps are `ids` from zero or `calls` (default: as `levels.json` says).

    Raises:
        ValueError: no checkpoints, levels that are not told, or a file that does not fit; names it.
    """
    from ttsnap.rewards import registry
    from ttsnap.rewards.noise_aware import NoiseAwareReward

    name = str(clean.clean)
    steps = find_steps(folder, name)
    if name not in LAYOUTS or not steps:
        raise ValueError(f"{folder} holds no noise-aware checkpoints of {name} (Ct14.pt, {name}/step7.pt)")
    if sigmas is None or counted is None:
        sigmas, counted = read_levels(folder)
    if counted not in COUNTED:
        raise ValueError(f"steps are counted as one of {', '.join(COUNTED)}, got {counted!r}")
    calls = {step + COUNTED[counted]: path for step, path in steps.items()}
    for call, path in calls.items():
        if not 1 <= call <= len(sigmas):
            raise ValueError(f"{path} would be of call {call}, but there are sigmas of calls 1 to {len(sigmas)}")
    reward = registry.load_clean(clean, device)
    levels = {float(sigmas[call - 1]): read_checkpoint(reward, path, name) for call, path in calls.items()}
    return NoiseAwareReward(reward, dict(reward.named_parameters()), levels, name)


def read_checkpoint(reward: nn.Module, path: Path, name: str) -> Mapping[str, Tensor]:
    """All parameters of a reward from a checkpoint, under the reward's names; mapped from disk, not read.

    Raises:
        ValueError: the file does not fit; names it.
    """
    from ttsnap.rewards import conversion

    what = f"a noise-aware {name} checkpoint"
    state = conversion.read_state(path)
    conversion.expect_layout(state, (LAYOUTS[name],), path, what)
    if name == "imagereward":
        tensors = conversion.imagereward_tensors(state)
    else:
        tensors = {f"clip.{key}": tensor for key, tensor in conversion.clip_tensors(state).items()}
    conversion.check_strictly(dict(reward.named_parameters()), tensors, path, what)
    return tensors
