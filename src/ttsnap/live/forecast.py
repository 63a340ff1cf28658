"""What a search, or other work of a verb, would run and cost, said before it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ttsnap import policies
from ttsnap.core.cost import Cost, format_amount
from ttsnap.core.grid import Rung

if TYPE_CHECKING:
    from ttsnap.live.open_search import Setup
    from ttsnap.pipelines.sampler import Sampler

TRAINED = 3  # a forward and a backward pass take about as much as three forward passes


@dataclass(frozen=True)
class Work:
    """Work of a verb that has not been done.

    Attributes:
        what: in words.
        calls: of the denoiser.
        looks: judgements of pictures.
        tflop: of all of it; NaN where it cannot be said.
        seconds: the same, as measured by a few calls and looks.
        weights: bytes of the weights of models and rewards.
        disk: about how many bytes are written.
    """

    what: str
    calls: int = 0
    looks: int = 0
    tflop: float = math.nan
    seconds: float = math.nan
    weights: int = 0
    disk: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object; what cannot be said is null."""
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value for key, value in vars(self).items()
        }

    def __str__(self) -> str:
        counts = [f"{self.calls} denoiser calls"] * bool(self.calls) + [f"{self.looks} looks"] * bool(self.looks)
        tflop = [] if math.isnan(self.tflop) or not self.tflop else [format_amount(self.tflop, "TFLOP")]
        seconds = ["seconds not known"] if math.isnan(self.seconds) else [f"about {self.seconds:.3g} s"]
        places = f"weights {_size(self.weights)}; about {_size(self.disk)} on the disk"
        return f"{self.what}\n{', '.join([*counts, *tflop, *seconds])}\n{places}"


def _size(count: int) -> str:
    """Bytes for people to read, such as `17.7 MiB`."""
    units = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
    return next((f"{count / one:.3g} {name}" for name, one in units if count >= one), f"{count} bytes")


def sampled(
    what: str,
    sampler: Sampler,
    judges: Mapping[str, Any],
    prompt: str,
    prompts: int,
    candidates: int,
    calls: Sequence[int],
    disk: int,
    kinds: int = 1,
) -> Work:
    """Candidates that all go to the last call and are looked at on the way.

    Args:
        what: in words.
        sampler: of the model.
        judges: rewards by name, perhaps none.
        prompt: one of them.
        prompts: how many.
        candidates: of each.
        calls: after which they are looked at.
        disk: bytes that are written.
        kinds: ways of looking, which are taken to cost the same.
    """
    from ttsnap.live.calibration import calibrate
    from ttsnap.pipelines.flops import cost_model

    model = calibrate(sampler, judges, cost_model(sampler, judges, prompt), prompt)
    once = model.of_plan([Rung(sampler.num_steps, candidates)], prompts)
    cost = model.of_plan([Rung(call, candidates) for call in sorted({*calls, sampler.num_steps})], prompts)
    more = kinds - 1
    return Work(
        what,
        cost.nfe,
        cost.looks + more * (cost.looks - once.looks),
        cost.tflop + more * (cost.tflop - once.tflop),
        cost.seconds + more * max(0.0, cost.seconds - once.seconds),
        _weights(sampler.pipe, *judges.values()),
        disk,
    )


def judged(
    what: str,
    judges: Mapping[str, Any],
    pictures: int,
    size: tuple[int, int],
    device: Any,
    disk: int,
    batch: int = 32,
    passes: int = 1,
) -> Work:
    """Pictures that rewards look at, or are trained on.

    Args:
        what: in words.
        judges: rewards by name.
        pictures: how many.
        size: their width and height.
        device: where the rewards are.
        disk: bytes that are written.
        batch: pictures at a time.
        passes: forward passes that a picture takes.
    """
    from ttsnap.live.judging import judge
    from ttsnap.pipelines.counting import some_pictures
    from ttsnap.pipelines.flops import count_looks

    width, height = size
    some = some_pictures(max(1, min(batch, pictures)), height, width, device)

    def timed() -> float:
        begun = time.perf_counter()
        for name, reward in judges.items():
            judge(name, reward, some, ["a"] * len(some), 0.0)
        return time.perf_counter() - begun

    timed()  # warm up
    seconds = timed() / len(some)
    each = count_looks(judges, some[:1], "a").look
    total = pictures * passes
    return Work(what, 0, total * len(judges), total * each, total * seconds, _weights(*judges.values()), disk)


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

    @property
    def work(self) -> Work:
        """All of it in the form of other verbs' work."""
        looks = ", ".join(f"{rung.size} after {rung.step} calls" for rung in self.plan if rung.size)
        what = f"{self.model}: {self.policy['policy']}, {self.candidates} candidates per prompt; looks at {looks}"
        total = self.total
        return Work(what, total.nfe, total.looks, total.tflop, total.seconds, self.weights, self.disk)

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
