"""What a search would run and cost, said before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ttsnap import policies
from ttsnap.core.cost import Cost, format_amount
from ttsnap.core.grid import Rung

if TYPE_CHECKING:
    from ttsnap.live.open_search import Setup


@dataclass(frozen=True)
class Forecast:
    """A search that has not been run.

    Attributes:
        model: name of the model.
        policy: as a JSON object.
        candidates: started per prompt.
        plan: who is looked at where, of one prompt; an upper bound where it depends on rewards.
        prompts: how many.
        prompt: cost of one of them, with seconds as measured by a few calls.
        total: of all of them, which share batches.
        weights: bytes of the pipeline's and the rewards' weights.
        disk: about how many bytes the pictures take.
    """

    model: str
    policy: dict[str, Any]
    candidates: int
    plan: tuple[Rung, ...]
    prompts: int
    prompt: Cost
    total: Cost
    weights: int
    disk: int

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        found = dict(vars(self)) | {"plan": [rung._asdict() for rung in self.plan]}
        return found | {"prompt": self.prompt.to_dict(), "total": self.total.to_dict()}

    @property
    def lines(self) -> list[str]:
        """For people, a line each."""
        looks = ", ".join(f"{rung.size} after {rung.step} calls" for rung in self.plan if rung.size)
        name = self.policy["policy"]
        found = [f"{self.model}: {name}, {self.candidates} candidates per prompt; looks at {looks}"]
        for what, cost in (("a prompt", self.prompt), (f"all {self.prompts} prompts", self.total))[
            : min(2, self.prompts)
        ]:
            parts = [f"{cost.nfe} denoiser calls", f"{cost.looks} looks", format_amount(cost.tflop, "TFLOP")]
            found.append(f"{what}: {', '.join(parts)}, about {_time(cost.seconds)}")
        found.append(f"weights {self.weights / 2**30:.3g} GiB; pictures about {self.disk / 2**20:.3g} MiB on the disk")
        return found


def forecast(session: Setup, prompts: Sequence[str], *, top: int = 1, board: bool = True) -> Forecast:
    """What a search for some prompts would cost; a few calls are made to measure seconds.

    Args:
        session: prepared.
        prompts: that would be searched for.
        top: pictures kept of each.
        board: whether a board is drawn.
    """
    from ttsnap.live.calibration import calibrate

    sampler, steps = session.sampler, session.sampler.num_steps
    model = session.cost_model
    if model.call_seconds is None:
        model = calibrate(sampler, session.judges, model, prompts[0])
    plan = session.policy.plan(session.candidates, steps)
    judges = [*session.judges.values(), *session.held_out.values()]
    picture = 2 * sampler.height * sampler.width  # a PNG of a photograph takes about two bytes a pixel
    tiles = sum(rung.size for rung in plan) * 40_000 if board else 0
    return Forecast(
        session.model,
        policies.to_dict(session.policy),
        session.candidates,
        plan,
        len(prompts),
        model.of_plan(plan),
        model.of_plan(plan, len(prompts)),
        _weights(sampler.pipe) + sum(map(_weights, judges)),
        len(prompts) * (top * picture + tiles),
    )


def _weights(owner: Any) -> int:
    """Bytes of the parameters of a pipeline or a reward, each tensor once."""
    import torch

    parts = getattr(owner, "components", None) or vars(owner)
    modules = [owner, *parts.values()] if isinstance(parts, dict) else [owner]
    tensors = {
        id(parameter): parameter.numel() * parameter.element_size()
        for module in modules
        if isinstance(module, torch.nn.Module)
        for parameter in module.parameters()
    }
    return sum(tensors.values())


def _time(seconds: float) -> str:
    """Seconds for people."""
    for size, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} s"
