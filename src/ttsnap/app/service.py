"""What is offered on the page: models and rewards, within limits, and the queue for the device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ttsnap.app.options import Offered
from ttsnap.app.queue import POLICIES, Limits, Queue, Request
from ttsnap.files.prompts import tidied
from ttsnap.live.settings import ModelSettings, read_size
from ttsnap.pipelines.additions import Additions
from ttsnap.pipelines.conditions import Pictures
from ttsnap.pipelines.loading import Loading
from ttsnap.pipelines.models import MODELS

logger = logging.getLogger(__name__)


@dataclass
class Models:
    """Pipelines and rewards, each loaded once, when it is first used; only in one's turn.

    Attributes:
        device: where they run.
        dtype: of the pipelines.
        own: by model, the size and the steps that it has unless told otherwise, once they are known.
        offered: files that the options of a request may name.
    """

    device: str | None = None
    dtype: str | None = None
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    offered: Offered = field(default_factory=Offered)
    _pipes: dict[tuple[str, Loading], Any] = field(default_factory=dict)
    _judges: dict[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> Loading:
        """How a model is loaded unless told otherwise."""
        return Loading(device=self.device, dtype=self.dtype)

    def settings(self, request: Request) -> tuple[ModelSettings, Pictures]:
        """What a request says of the model, its call and its pictures.

        Raises:
            ValueError: what is wrong with its options.
        """
        given = self.offered.read(request.options, request.pictures)
        shown = {key: given.pop(key) for key in [field.name for field in fields(Pictures)] if key in given}
        first = (request.image,) if request.image else ()
        shown["image"] = tuple(Path(file) for file in (*first, *shown.get("image", ())))
        shown |= {key: Path(shown[key]) for key in ("mask", "control_image") if key in shown}
        settings = ModelSettings(
            model=request.model,
            steps=request.steps,
            size=request.size,
            guidance=request.guidance,
            negative_prompt=request.negative_prompt,
            lora=request.loras,
            device=self.device,
            dtype=self.dtype,
            **given,
        )
        return settings, Pictures(strength=request.strength, **shown)

    def searcher(self, request: Request) -> Any:
        """A prepared searcher for what was ordered."""
        from ttsnap import rewards
        from ttsnap.live.session import prepare
        from ttsnap.pipelines.loading import find_device, quiet_libraries

        quiet_libraries()
        settings, pictures = self.settings(request)
        loading = Loading(**{field.name: getattr(settings, field.name) for field in fields(Loading)})
        keywords, lines, notes = settings.keywords(pictures), list[str](), list[str]()
        pipe: Any = request.model
        if not pictures.ip_adapter:  # which changes the pipeline: it is loaded for this search alone
            loaded = self._loaded(request.model, loading)
            pipe, lines, notes = loaded.pipe, loaded.lines, loaded.notes
            keywords = {key: value for key, value in keywords.items() if key not in vars(loading)}
        for name in request.rewards:
            if name not in self._judges:
                self._judges |= rewards.load([name], find_device(self.device))
        made = prepare(
            pipe,
            reward={name: self._judges[name] for name in request.rewards},
            budget=request.budget,
            candidates=request.candidates,
            policy=POLICIES[request.policy],
            prompt=request.prompt,
            **keywords,
        )
        made.sampler.prelude = "; ".join(filter(None, [*lines, made.sampler.prelude]))
        for note in notes:
            made.sampler.note(note)
        for name in ("attention", "config", "quantize", *(part.name for part in fields(Additions))):
            if value := getattr(settings, name):
                made.asked[name] = value
        if request.model not in MODELS and not (pictures or request.options or request.steps or request.size):
            size = f"{made.sampler.width}x{made.sampler.height}"
            self.own[request.model] = {"size": size, "steps": made.sampler.num_steps}
        for value in made.sampler.arguments.values():  # a visitor has no use for where the server keeps his pictures
            for picture in value if isinstance(value, list | tuple) else [value]:
                if file := getattr(picture, "filename", ""):
                    picture.filename = Path(file).name
        return made

    def defaults(self, model: str) -> dict[str, Any]:
        """Size and steps that a model has unless told otherwise, where they are known."""
        if model not in MODELS:
            return self.own.get(model, {})
        own = MODELS[model].arguments
        return {"size": f"{own['width']}x{own['height']}", "steps": own["num_inference_steps"]}

    def steps(self, request: Request) -> int | None:
        """Denoiser calls of a finished image, where none are given and they are known; a tuned schedule has its own."""
        from ttsnap.core.cost import Budget
        from ttsnap.policies import tuned_policy

        budget = Budget.parse(request.budget) if request.budget else None
        tuned = None
        if POLICIES[request.policy] is None and not (request.image or request.pictures):
            tuned = tuned_policy(request.model, request.rewards, None, budget)
        return tuned[1] if tuned else self.defaults(request.model).get("steps")

    def unread(self, model: str, prompt: str) -> str | None:
        """What is to be said of a prompt that the model does not read as it stands; None if it does, or is not there.

        Nothing is loaded for it.
        """
        import warnings

        from ttsnap.pipelines.text import warn_if_cut

        if (reads := getattr(MODELS.get(model), "reads", None)) is not None:
            try:
                reads(prompt)
            except ValueError as error:
                return str(error)
        if (loaded := self._pipes.get((model, self.plain))) is None:
            return None
        kept = [part for name, part in loaded.pipe.components.items() if name.startswith("tokenizer") and part]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for tokenizer in kept:
                if tokenizer.model_max_length < 1 << 20:
                    warn_if_cut(tokenizer, prompt, tokenizer.model_max_length, "this model")
        return str(said[-1].message) if kept and len(said) == len(kept) else None

    def _loaded(self, model: str, loading: Loading) -> Any:
        """A pipeline; of those that are not loaded plainly only the last one stays."""
        from ttsnap.pipelines.loading import load

        if (model, loading) not in self._pipes:
            for other in [key for key in self._pipes if key[1] != self.plain]:
                del self._pipes[other]
            self._pipes[model, loading] = load(model, loading)
        return self._pipes[model, loading]


class Service:
    """What is offered, and within which limits.

    Args:
        out: everything is written below this folder.
        models: names of models on offer; nothing else is ever loaded.
        rewards: names of rewards on offer (default: those of the models).
        device: where the models run.
        dtype: their dtype.
        limits: of what a visitor may ask for.
        loras: LoRAs on offer, as `ttsnap generate --lora` takes them.
        offered: other files of models that the options of visitors may name.
    """

    def __init__(
        self,
        out: Path,
        models: Sequence[str] = ("shapes",),
        rewards: Sequence[str] = (),
        device: str | None = None,
        dtype: str | None = None,
        limits: Limits | None = None,
        loras: Sequence[str] = (),
        offered: Offered | None = None,
    ) -> None:
        from ttsnap.pipelines.loading import check_model
        from ttsnap.rewards import names_of

        for name in models:
            check_model(name)
        Loading(lora=tuple(loras)).check_files()
        files = offered or Offered()
        files.check()
        own = [MODELS[name].reward for name in models if name in MODELS and MODELS[name].reward]
        self.rewards = list(dict.fromkeys([*rewards, *own]))
        if not self.rewards:
            raise ValueError("name a reward with --reward; these models have none of their own")
        names_of(self.rewards)
        self.out, self.offered, self.loras = Path(out).resolve(), list(models), list(loras)
        self.warming = False
        self.out.mkdir(parents=True, exist_ok=True)
        self.models, self.limits, self.queue = Models(device, dtype, offered=files), limits or Limits(), Queue()

    def warm(self) -> threading.Thread:
        """Load the first model on offer in the background; the thread that does it."""

        self.warming = True
        who = object()
        self.queue.join(who)

        def load() -> None:
            self.queue.wait(who, lambda: True)
            try:
                self.models.searcher(Request("a", self.offered[0], (self.rewards[0],), candidates=1))
            except Exception as error:  # a search for it says so
                logger.warning("%s could not be loaded: %s", self.offered[0], error)
            finally:
                self.warming = False
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
        prompt = tidied(request.prompt, most=limits.prompt)
        if request.model not in self.offered:
            raise ValueError(f"there is no model {request.model!r} here; there is {', '.join(self.offered)}")
        if not request.rewards or set(request.rewards) - set(self.rewards):
            raise ValueError(f"choose one reward or more of {', '.join(self.rewards)}")
        if request.policy not in POLICIES:
            raise ValueError(f"there is no policy {request.policy!r} here; there is {', '.join(POLICIES)}")
        if request.steps is not None and not 1 <= request.steps <= limits.steps:
            raise ValueError(f"steps must be 1 to {limits.steps}, got {request.steps}")
        sides = read_size(request.size)
        if any(sides.get(side, 1) > limits.side for side in ("width", "height")):
            raise ValueError(f"size must be 1 to {limits.side} pixels a side, got {request.size}")
        if request.guidance is not None and not 0 <= request.guidance <= 100:
            raise ValueError(f"guidance must be 0 to 100, got {request.guidance:g}")
        if len(request.negative_prompt or "") > limits.prompt:
            raise ValueError(f"the negative prompt is longer than {limits.prompt} characters; shorten it")
        if wrong := set(request.loras) - set(self.loras):
            raise ValueError(f"there is no LoRA {min(wrong)!r} here; --lora offers one")
        if request.strength is not None and not request.image and "--image" not in request.options:
            raise ValueError("strength needs a picture to start from")
        if len(request.options) > limits.prompt:
            raise ValueError(f"the options are longer than {limits.prompt} characters; shorten them")
        if len(request.pictures) > limits.pictures:
            raise ValueError(f"options name at most {limits.pictures} pictures, got {len(request.pictures)}")
        self._check_pictures(self.models.settings(request)[1], request.size)
        if not 0 <= request.seed < 2**31:
            raise ValueError(f"the seed must be 0 to {2**31 - 1}, got {request.seed}")
        if request.candidates is not None:
            self.check_candidates(request.candidates)
        return replace(request, prompt=prompt)

    def _check_pictures(self, pictures: Pictures, size: str | None) -> None:
        """ValueError where a picture cannot be read, or makes pictures that are too large."""
        from ttsnap.files.pictures import read_picture

        files = [*pictures.image, *filter(None, (pictures.mask, pictures.control_image))]
        files += [Path(control.image) for control in pictures.controls()]
        files += [Path(image) for image, _ in pictures.adapters()]
        for file in files:
            try:
                sides = read_picture(file).size
            except ValueError as error:
                raise ValueError(str(error).replace(str(file), "the picture")) from error
            if size is None and max(sides) > self.limits.side:
                raise ValueError(
                    f"the picture has {sides[0]} x {sides[1]} pixels; give a size of at most {self.limits.side}"
                )

    def check_candidates(self, count: int) -> None:
        """ValueError where these are too many, or none."""
        if not 1 <= count <= self.limits.candidates:
            raise ValueError(f"a search here starts 1 to {self.limits.candidates} candidates, this would be {count}")
