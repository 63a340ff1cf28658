"""What is offered on the page: models and rewards, within limits, and the queue for the device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ttsnap.app.queue import POLICIES, Limits, Queue, Request

logger = logging.getLogger(__name__)


@dataclass
class Models:
    """Pipelines and rewards, each loaded once, when it is first used; only in one's turn."""

    device: str | None = None
    dtype: str | None = None
    _pipes: dict[str, Any] = field(default_factory=dict)
    _judges: dict[str, Any] = field(default_factory=dict)

    def searcher(self, request: Request) -> Any:
        """A prepared searcher for what was ordered."""
        from ttsnap import rewards
        from ttsnap.live.session import prepare
        from ttsnap.pipelines.conditions import Pictures
        from ttsnap.pipelines.loading import Loading, find_device, load_model, quiet_libraries

        quiet_libraries()
        if request.model not in self._pipes:
            self._pipes[request.model] = load_model(request.model, Loading(device=self.device, dtype=self.dtype))
        pipe = self._pipes[request.model]
        for name in request.rewards:
            if name not in self._judges:
                self._judges |= rewards.load([name], find_device(self.device))
        sizes: dict[str, Any] = {}
        if request.steps:
            sizes["num_inference_steps"] = request.steps
        if request.size:
            sizes |= {"height": request.size, "width": request.size}
        if request.image:
            sizes["pictures"] = Pictures(image=(Path(request.image),), strength=request.strength)
        session = prepare(
            pipe,
            reward={name: self._judges[name] for name in request.rewards},
            budget=request.budget,
            candidates=request.candidates,
            policy=POLICIES[request.policy],
            prompt=request.prompt,
            **sizes,
        )
        if request.image:  # a visitor has no use for where the server keeps it
            picture = session.sampler.arguments["image"]
            picture.filename = Path(picture.filename).name
        return session


class Service:
    """What is offered, and within which limits.

    Args:
        out: everything is written below this folder.
        models: names of models on offer; nothing else is ever loaded.
        rewards: names of rewards on offer (default: those of the models).
        device: where the models run.
        dtype: their dtype.
        limits: of what a visitor may ask for.
    """

    def __init__(
        self,
        out: Path,
        models: Sequence[str] = ("shapes",),
        rewards: Sequence[str] = (),
        device: str | None = None,
        dtype: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        from ttsnap.pipelines.loading import check_model
        from ttsnap.pipelines.models import MODELS
        from ttsnap.rewards import names_of

        for name in models:
            check_model(name)
        own = [MODELS[name].reward for name in models if name in MODELS and MODELS[name].reward]
        self.rewards = list(dict.fromkeys([*rewards, *own]))
        if not self.rewards:
            raise ValueError("name a reward with --reward; these models have none of their own")
        names_of(self.rewards)
        self.out, self.offered = Path(out).resolve(), list(models)
        self.out.mkdir(parents=True, exist_ok=True)
        self.models, self.limits, self.queue = Models(device, dtype), limits or Limits(), Queue()

    def warm(self) -> threading.Thread:
        """Load the first model on offer in the background; the thread that does it."""

        def load() -> None:
            who = object()
            self.queue.join(who)
            self.queue.wait(who, lambda: True)
            try:
                self.models.searcher(Request("a", self.offered[0], (self.rewards[0],), candidates=1))
            except Exception as error:  # a search for it says so
                logger.warning("%s could not be loaded: %s", self.offered[0], error)
            finally:
                self.queue.leave(who)

        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        return thread

    def check(self, request: Request) -> Request:
        """The request, tidied.

        Raises:
            ValueError: not on offer, or beyond the limits.
        """
        limits = self.limits
        prompt = " ".join(request.prompt.split())
        if not prompt:
            raise ValueError("the prompt is empty; it needs at least one word")
        if len(prompt) > limits.prompt:
            raise ValueError(f"the prompt has {len(prompt)} characters; at most {limits.prompt} are taken")
        if request.model not in self.offered:
            raise ValueError(f"there is no model {request.model!r} here; there is {', '.join(self.offered)}")
        if not request.rewards or set(request.rewards) - set(self.rewards):
            raise ValueError(f"choose one reward or more of {', '.join(self.rewards)}")
        if request.policy not in POLICIES:
            raise ValueError(f"there is no policy {request.policy!r} here; there is {', '.join(POLICIES)}")
        for name, value, most in (("size", request.size, limits.side), ("steps", request.steps, limits.steps)):
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {value}")
        if request.image:
            self._check_image(request)
        elif request.strength is not None:
            raise ValueError("strength needs a picture to start from")
        if not 0 <= request.seed < 2**31:
            raise ValueError(f"the seed must be 0 to {2**31 - 1}, got {request.seed}")
        if request.candidates is not None:
            self.check_candidates(request.candidates)
        return replace(request, prompt=prompt)

    def _check_image(self, request: Request) -> None:
        """ValueError where a picture cannot be read, or makes pictures that are too large."""
        from ttsnap.files.pictures import read_picture

        assert request.image
        try:
            sides = read_picture(request.image).size
        except ValueError as error:
            raise ValueError(str(error).replace(request.image, "the picture")) from error
        if request.size is None and max(sides) > self.limits.side:
            raise ValueError(
                f"the picture has {sides[0]} x {sides[1]} pixels; give a size of at most {self.limits.side}"
            )
        if request.strength is not None and not 0 < request.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {request.strength:g}")

    def check_candidates(self, count: int) -> None:
        """ValueError where these are too many, or none."""
        if not 1 <= count <= self.limits.candidates:
            raise ValueError(f"a search here starts 1 to {self.limits.candidates} candidates, this would be {count}")
