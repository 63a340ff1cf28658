"""What a search would run and cost, said before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ttsnap import policies
from ttsnap.core.cost import Cost
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
        _weights(sampler.pipe, *judges),
        len(prompts) * (top * picture + tiles),
    )


def _weights(*owners: Any) -> int:
    """Bytes of the parameters of pipelines and rewards, each tensor once."""
    import torch

    parts = [getattr(owner, "components", None) or getattr(owner, "__dict__", {}) for owner in owners]
    modules = [*owners, *(part for own in parts for part in own.values())]
    tensors = {
        id(parameter): parameter.numel() * parameter.element_size()
        for module in modules
        if isinstance(module, torch.nn.Module)
        for parameter in module.parameters()
    }
    return sum(tensors.values())
