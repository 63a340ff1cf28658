"""Any diffusers pipeline, with its own `__call__` and its own scheduler: no adapter, slower, exact by construction."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttsnap.samplers.base import PipelineSampler, Trajectories
from ttsnap.samplers.dry_run import Actors, Probe, Skip, counting, replaced, stand_in
from ttsnap.samplers.estimates import Step
from ttsnap.samplers.outputs import as_images, chosen_frames, objections, warn_of_blanks, written
from ttsnap.samplers.stock_call import Memo, OnStep, StockCall, own_copy

RESERVED = {
    "prompt": "the search gives the prompt",
    "generator": "the search gives a generator per candidate",
    "latents": "a candidate's noise depends on its seed alone",
    "output_type": "images are asked for as numbers",
    "return_dict": "the result is read as it is",
    "num_images_per_prompt": "a candidate is one image",
    "num_videos_per_prompt": "a candidate is one video",
    "callback_on_step_end": "a call waits in its scheduler's step",
}
ENCODERS = ("encode_prompt", "_encode_prompt")


@dataclass(frozen=True)
class Calls(Trajectories):
    """Candidates whose calls wait at the same step; `calls` [n] are None at step 0."""

    calls: tuple[StockCall | None, ...] = ()


class AnyPipelineSampler(PipelineSampler):
    """One stock call per candidate, suspended at a step and resumed or dropped later.

    A step is one step of the pipeline's scheduler. Most make one per `num_inference_steps`; Heun and KDPM2 make
    2 n - 1, PNDM n + 1, image-to-image about `strength` x n. Their number, the noise levels, sizes and costs are found
    out when the sampler is made, by a call in which the denoiser works once.

    Args:
        pipe: any pipeline that makes one image or one video of a prompt and takes a generator.
        num_steps: its `num_inference_steps` (default, as for all that follow: the pipeline's own).
        height: image height in pixels.
        width: image width in pixels.
        guidance_scale: strength of guidance.
        negative_prompt: what guidance leads away from.
        true_cfg_scale: strength of classifier-free guidance, where that is another than `guidance_scale`.
        max_sequence_length: most text tokens.
        max_batch: images that are judged together; calls and decodes are of one.
        look_frames: of a video, the frames that are looked at: indices, or `first`, `middle`, `last` (all three).
        arguments: more arguments of the pipeline's call: `image`, `strength`, `control_image`, ...

    Raises:
        ValueError: the pipeline takes no such argument, or is none that a search can drive; the message says why.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        num_steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        true_cfg_scale: float | None = None,
        max_sequence_length: int | None = None,
        max_batch: int | None = None,
        look_frames: Sequence[int | str] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"steps must be at least 1, got {num_steps}")
        named = {
            "num_inference_steps": num_steps,
            "height": height,
            "width": width,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "true_cfg_scale": true_cfg_scale,
            "max_sequence_length": max_sequence_length,
        }
        self.pipe = pipe
        self.arguments = {name: value for name, value in named.items() if value is not None} | dict(arguments or {})
        self._fixed = _check(pipe, self.arguments)
        self._texts = {name: Memo() for name in ENCODERS if callable(getattr(pipe, name, None))}
        self._pictures = Memo(limit=8)
        self._encoders: dict[str, Memo] = {}  # models that encode where no `encode_prompt` does
        self._processors = _processors(pipe)
        self._swaps_processors = False
        self._skips = self._decodes_exactly = True
        self._some_prompt = "a"
        self.probe, image, latents = self._learn()
        frames = image.shape[1] if image.ndim == 5 else 0
        super().__init__(
            pipe,
            num_steps=self.probe.num_steps,
            height=image.shape[-2],
            width=image.shape[-1],
            max_batch=max_batch or (1 if frames else None),
        )
        self.look_frames = chosen_frames(look_frames, frames)
        self._check_decoding(image, latents)
        for memo in (*self._texts.values(), *self._encoders.values(), self._pictures):
            memo.forget()  # counting chose other kernels, which round differently

    # What every sampler provides.

    @property
    def sigmas(self) -> list[float]:
        """Noise level of each step [num_steps]: sigma of a flow, else noise per signal."""
        return self.probe.sigmas

    @property
    def timesteps(self) -> list[float]:
        """Model time of each step [num_steps], as the scheduler has it."""
        return self.probe.timesteps

    @property
    def passes(self) -> int:
        """Denoiser passes per step, such as 2 where guidance makes one of its own; in a batch of two it is 1."""
        return round(self.probe.passes)

    def call_options(self) -> dict[str, Any]:
        """Arguments of the pipeline, beside prompt and generator."""
        return dict(self.arguments)

    def reproduce(self, prompt: str, seed: int) -> str:
        """A line of Python with which the stock pipeline `pipe` makes the image of a prompt and seed."""
        given = "".join(f", {name}={written(name, value)}" for name, value in self.arguments.items())
        return f'pipe({prompt!r}{given}, generator=torch.Generator("cpu").manual_seed({seed}))'

    @property
    def check_tflop(self) -> float:
        """TFLOP of the pipeline's safety checker, if it has one."""
        return self.probe.check_tflop

    def counted(self) -> tuple[float, float, float]:
        """TFLOP of one step, one decode and one encoded prompt, counted in the call that the sampler began with."""
        return self.probe.step_tflop, self.probe.tflop["decode"] - self.check_tflop, self.probe.tflop["prompt"]

    def forget_prompts(self) -> None:
        """Drop the cached prompt encodings."""
        super().forget_prompts()
        for memo in (*self._texts.values(), *self._encoders.values()):
            memo.forget()

    def start(self, prompts: Sequence[str], seeds: Sequence[int]) -> Calls:
        """Candidates at step 0, whose calls have not begun: there are no latents yet, [n, 0]."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds need as many prompts, got {len(prompts)}")
        self._some_prompt = next(iter(prompts), self._some_prompt)
        nothing = torch.empty(len(seeds), 0, device=self.device)
        return Calls(tuple(prompts), tuple(seeds), 0, nothing, calls=(None,) * len(seeds))

    @torch.no_grad()
    def advance(self, trajectories: Trajectories, to_step: int) -> Calls:
        """Bring all candidates to `to_step`, one after the other.

        A call only goes forward, and in the thread that began it. Where that is not what is asked for, the candidate is
        made again from its seed, with the same result.

        Raises:
            ValueError: the step is not ahead or beyond the last, or the pipeline did not like what it was given.
            RuntimeError: the pipeline failed; the message names prompt and seed.
            MemoryError: a candidate does not fit into memory.
        """
        assert isinstance(trajectories, Calls)
        self.check_step(trajectories, to_step)
        calls, states = [], []
        for row, call in enumerate(trajectories.calls):
            prompt, seed = trajectories.prompts[row], trajectories.seeds[row]
            if call is None or not call.waits_at(trajectories.step):
                call = self._begin(prompt, seed)
            with self._named(prompt, seed):
                states.append(self._run(call, to_step))
            calls.append(call)
        latents, x0 = (torch.cat([state[i] for state in states]) for i in range(2))
        return Calls(trajectories.prompts, trajectories.seeds, to_step, latents, x0, calls=tuple(calls))

    @torch.no_grad()
    def look(self, trajectories: Trajectories) -> Tensor:
        """Images [n, 3, h, w] (videos [n, frames, 3, h, w]) of candidates; of finished ones what their calls return.

        The pipeline's safety checker, if it has one, sees finished images alone; a warning says which it made black.
        """
        assert isinstance(trajectories, Calls)
        assert trajectories.x0 is not None
        if self.preview_at(trajectories.step):
            return super().look(trajectories)
        images = []
        for row, call in enumerate(trajectories.calls):
            prompt, seed = trajectories.prompts[row], trajectories.seeds[row]
            with self._named(prompt, seed):
                waits = call is not None and call.waits_at(self.num_steps)
                finished = trajectories.step == self.num_steps
                if not waits and (self._decodes_exactly or not finished):
                    output = self._decoding(trajectories.x0[row : row + 1], prompt, seed, finished)
                else:
                    if call is None or not waits:  # it has returned, or belongs to another thread
                        call = self._begin(prompt, seed)
                        self._run(call, self.num_steps)
                    output = self._resume(call)
            warn_of_blanks(objections(output) or [False], [prompt], [seed])
            images.append(as_images(output, self.device))
        return torch.cat(images)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] (videos [n, frames, 3, h, w]) in 0..1, fp32, of predicted clean latents [n, ...]."""
        outputs = (self._decoding(x0[row : row + 1], self._some_prompt, 0, False) for row in range(len(x0)))
        return torch.cat([as_images(output, self.device) for output in outputs])

    def decode_spatial(self, latents: Tensor) -> Tensor:
        """Raises ValueError: only the pipeline decodes, and only latents of its own size."""
        raise ValueError(f"{type(self.pipe).__name__} runs with its own call, which has no small preview")

    def shown(self, images: Tensor) -> Tensor:
        """Of videos, the frames that are looked at."""
        return images[:, list(self.look_frames)] if self.look_frames else images

    # One candidate.

    def _begin(self, prompt: str, seed: int) -> StockCall:
        return StockCall(functools.partial(self._call, prompt, seed))

    def _call(self, prompt: str, seed: int, on_step: OnStep, parts: Mapping[str, Any] | None = None) -> Any:
        """The pipeline's call for one candidate, from its beginning to its end."""
        return self._own(on_step, parts)(**self._given(prompt, seed))

    def _own(self, on_step: OnStep, parts: Mapping[str, Any] | None = None) -> Any:
        """A copy of the pipeline for one call, which encodes a prompt or a picture only if no other call has."""
        parts = dict(parts or {})
        vae = getattr(self.pipe, "vae", None)
        if isinstance(vae, nn.Module) and (encode := getattr(vae, "encode", None)):
            parts["vae"] = copy.copy(vae)
            vars(parts["vae"])["encode"] = self._pictures.wrap(encode)
        for name, memo in self._encoders.items():
            model = getattr(self.pipe, name)
            parts[name] = stand_in(model, memo.wrap(model.__call__))
        own = own_copy(self.pipe, on_step, parts)
        for name, memo in self._texts.items():
            vars(own)[name] = memo.wrap(_method(own, name))
        return own

    def _given(self, prompt: str, seed: int) -> dict[str, Any]:
        generator = torch.Generator("cpu").manual_seed(seed)
        return {"prompt": prompt, **self.arguments, **self._fixed, "generator": generator}

    def _run(self, call: StockCall, to_step: int) -> tuple[Tensor, Tensor]:
        """Latents and x0 estimate [1, ...] of a call at `to_step`; the last estimate is the finished latent."""
        while call.step < to_step:
            step = self._resume(call)
            if call.done:
                raise RuntimeError(f"the call ended after {call.step} of {self.num_steps} steps")
            if self.on_calls:
                self.on_calls(1)
        assert isinstance(step, Step)
        latents = step.following
        x0 = latents.float() if to_step == self.num_steps else step.clean
        return (latents, x0) if self.probe.batched else (latents[None], x0[None])

    def _resume(self, call: StockCall) -> Any:
        """Resume a call; some pipelines put attention processors of their own into the shared models for its time."""
        if not self._swaps_processors:
            return call.resume()
        models = _attending(self.pipe)
        if call.processors:
            _set_processors(models, call.processors)
        try:
            answer = call.resume()
            call.processors = _processors(self.pipe)
        finally:
            _set_processors(models, self._processors)
        return answer

    @contextmanager
    def _named(self, prompt: str, seed: int) -> Iterator[None]:
        """Errors inside name the candidate."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise MemoryError(self.too_big) from error
        except Exception as error:
            kind = ValueError if isinstance(error, ValueError | TypeError) else RuntimeError
            text = str(error) or type(error).__name__
            raise kind(f"{type(self.pipe).__name__}, prompt {prompt!r}, seed {seed}: {text}") from error

    # What the pipeline tells and does without its denoiser.

    @torch.no_grad()
    def _learn(self) -> tuple[Probe, Tensor, Tensor]:
        """Run the pipeline with a denoiser that works once: what that told, its image, its last latents."""
        probe, name = Probe(), type(self.pipe).__name__
        memos = (*self._texts.values(), self._pictures)
        with counting(self.pipe._execution_device) as count:
            actors = Actors(self.pipe, count=count, remembered=lambda: any(memo.asking for memo in memos))
            probe.forwards = actors.forwards
            for memo in memos:
                memo.count = count
            last: list[Step] = []

            def on_step(step: Step) -> Any:
                if not last:
                    probe.batched = len(step.sample) == 1
                    step.clean  # noqa: B018  complains about unknown schedulers here
                    self._swaps_processors = _processors(self.pipe) != self._processors
                probe.sigmas.append(step.level.noise)
                probe.timesteps.append(float(torch.as_tensor(step.timestep).flatten()[0]))
                actors.step = probe.num_steps
                probe.tflop["loop"] = count()
                last[:] = [step]
                return step.result

            try:
                output = self._call(self._some_prompt, 0, on_step, actors.parts)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{name} does not run with these arguments: {error}") from error
            if not last:
                raise ValueError(f"{name} made no step of its scheduler, so that its calls cannot be suspended")
            probe.tflop["decode"] = count() - probe.tflop["loop"]
            prompt = next(iter(self._texts.values()), Memo()).tflop
            probe.tflop["prompt"] = prompt + sum(f.tflop for f in probe.encoders)
            self._encoders = {f.name: Memo(limit=16) for f in probe.encoders}
        for memo in memos:
            memo.count = None
        latents = last[0].following
        return probe, as_images(output, self.pipe._execution_device), latents if probe.batched else latents[None]

    @torch.no_grad()
    def _decoding(self, x0: Tensor, prompt: str, seed: int, finished: bool) -> Any:
        """What the pipeline makes of an x0 estimate [1, ...]: a call whose steps all return it.

        A safety checker is left out unless the image is finished.
        """
        x0 = x0 if self.probe.batched else x0[0]
        actors = Actors(self.pipe, self.probe)
        parts: dict[str, Any] = dict(actors.parts)
        if not finished and hasattr(self.pipe, "safety_checker"):
            parts["safety_checker"] = None

        def on_step(step: Step) -> Any:
            actors.step += 1
            if actors.step == 1 and self._skips and self.num_steps > 2:
                own._interrupt = Skip(self.num_steps - 1)
            return replaced(step, x0)

        own = self._own(on_step, parts)
        return own(**self._given(prompt, seed))

    def _check_decoding(self, image: Tensor, latents: Tensor) -> None:
        """Decoding apart from the call, with skipped steps or without, must give the call's own image; else warn."""
        with counting(self.device):  # with the kernels that made the image
            for self._skips in (True, False):
                output = self._decoding(latents, self._some_prompt, 0, True)
                self._decodes_exactly = torch.equal(as_images(output, self.device), image)
                if self._decodes_exactly:
                    return
        self.notes.append(
            f"{type(self.pipe).__name__} draws noise when it decodes, or decodes more than its last latents: early "
            "looks show about what it would make of an x0 estimate; finished images are exact"
        )


def _check(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that every call gets, after a check of those that were given.

    Raises:
        ValueError: the pipeline cannot be driven, or takes no such argument.
    """
    name = type(pipe).__name__
    taken = inspect.signature(type(pipe).__call__).parameters if callable(pipe) else {}
    if getattr(pipe, "scheduler", None) is None or not {"prompt", "generator"} <= set(taken):
        raise ValueError(f"a search needs a pipeline with a scheduler that takes prompt and generator; {name} is none")
    for argument in arguments:
        if argument in RESERVED:
            raise ValueError(f"{argument} cannot be set: {RESERVED[argument]}")
        if argument not in taken:
            free = [key for key in taken if key not in ("self", "kwargs", *RESERVED)]
            raise ValueError(f"{name} takes no {argument}; it takes {', '.join(free)}")
    for model in _attending(pipe).values():
        if getattr(model, "is_cache_enabled", False):
            raise ValueError(
                f"{name}'s denoiser reuses what it kept of the step before, which would mix candidates; call its "
                "disable_cache()"
            )
    return {"output_type": "np"} if "output_type" in taken else {}


def _attending(pipe: Any) -> dict[str, Any]:
    """The models of a pipeline whose attention processors can be changed."""
    names = ("unet", "transformer", "transformer_2")
    return {name: model for name in names if hasattr(model := getattr(pipe, name, None), "attn_processors")}


def _processors(pipe: Any) -> dict[str, dict[str, Any]]:
    """Attention processors by model and place; they are compared by identity."""
    return {name: dict(model.attn_processors) for name, model in _attending(pipe).items()}


def _set_processors(models: Mapping[str, Any], processors: Mapping[str, Any]) -> None:
    for name, model in models.items():
        model.set_attn_processor(dict(processors[name]))


def _method(own: Any, name: str) -> Callable[..., Any]:
    """A method of a pipeline that does not keep it alive: the pipeline will refer to it."""
    if name in vars(own):  # set on the object itself
        return vars(own)[name]  # type: ignore[no-any-return]
    reference, method = weakref.ref(own), getattr(type(own), name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(reference(), *args, **kwargs)

    return call
