"""Drives any stock pipeline: one suspended call per candidate, and what they ask for run in full batches."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ttsnap.pipelines import batching
from ttsnap.pipelines.batching import Layout, Unlike, Values
from ttsnap.pipelines.call import (
    END,
    Ask,
    Call,
    Memo,
    Progress,
    call_of,
    is_modular,
    method_of,
    models,
    own_arguments,
    own_containers,
    own_copy,
    quieten,
    random_kept,
    same,
    stand_ins,
    taken_by,
)
from ttsnap.pipelines.limits import Limits
from ttsnap.pipelines.outputs import as_images, chosen_frames, objections, warn_of_blanks, written
from ttsnap.pipelines.probe import Blank, Probe, first_calls, zeros
from ttsnap.pipelines.standing import Standing
from ttsnap.pipelines.text import warning_tokenizer

if TYPE_CHECKING:
    from ttsnap.diversity.negtome import Repulsion
    from ttsnap.pipelines.features import Features, Tap
    from ttsnap.pipelines.previews import Preview

RESERVED = {
    "prompt": "the search gives the prompt",
    "generator": "the search gives a generator per candidate",
    "latents": "a candidate's noise depends on its seed alone",
    "output_type": "images are asked for as numbers",
    "return_dict": "the result is read as it is",
    "num_images_per_prompt": "a candidate is one image; ask for more candidates",
    "num_videos_per_prompt": "a candidate is one video; ask for more candidates",
}
ENCODERS = ("encode_prompt", "_encode_prompt")
DEFAULT_BATCH = 32
DENOISED_PIXELS = 128 * 2**20  # of the first batches that are denoised: 32 images of four megapixels, 4 short videos
DECODED_PIXELS = 4 * 2**20  # of the first batches that are decoded; a decoder takes most of the memory


@dataclass(frozen=True)
class Trajectories:
    """Candidates at the same step, possibly of several prompts.

    Attributes:
        prompts: prompt of each candidate [n].
        seeds: seed of each candidate [n].
        step: denoiser calls made.
        latents: noisy latents [n, ...] in the model's dtype; [n, 0] at step 0, where the calls have not begun.
        x0: predicted clean latents after the last call [n, ...] in fp32; None at step 0.
        cells: features of that call on a grid [n, cells, channels], where a `Tap` listened.
        calls: the suspended calls [n]; None at step 0.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    step: int
    latents: Tensor
    x0: Tensor | None = None
    cells: Tensor | None = None
    calls: tuple[Call | None, ...] = ()

    def __len__(self) -> int:
        return len(self.seeds)

    def select(self, rows: Sequence[int]) -> Self:
        """Some of the candidates."""
        picked: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                picked[field.name] = value[torch.as_tensor(rows, device=value.device)]
            elif isinstance(value, tuple):
                picked[field.name] = tuple(value[row] for row in rows)
        return dataclasses.replace(self, **picked)


class Drawing:
    """One x0 estimate on its way to a picture, by the pipeline's own operations; waits for models as a `Call` does."""

    def __init__(self, way: Generator[Ask, Any, Tensor], prompt: str, seed: int, step: int) -> None:
        self.prompt, self.seed, self.step = prompt, seed, step
        self.ask: Ask | None = None
        self.output: Any = None
        self.error: Exception | None = None
        self.done = False
        self._way, self._answer = way, None

    @property
    def arrived(self) -> bool:
        """Whether it is a picture, or has failed."""
        return self.done or self.error is not None

    def answer(self, value: Any) -> None:
        """What the model that it waits for answered."""
        self.ask, self._answer = None, value

    def forward(self) -> None:
        """Go on until a model is asked for, or to the end."""
        if self.ask is not None or self.arrived:
            return
        answer, self._answer = self._answer, None
        try:
            self.ask = self._way.send(answer)
        except StopIteration as end:
            self.output, self.done = (end.value,), True
        except Exception as error:
            self.error = error


Waiting = Call | Drawing


class Sampler:
    """Drives one stock pipeline with its own call.

    A step is one step of the pipeline's scheduler. Most make one per `num_inference_steps`; Heun and KDPM2 make
    2 n - 1, PNDM n + 1, image-to-image about `strength` x n. Their number, the noise levels, sizes and costs are found
    out when the sampler is made, by calls in which the denoiser works once.

    Args:
        pipe: any pipeline that makes one image or one video of a prompt and takes a generator; its device and dtype
            are used as they are.
        max_batch: most candidates in one denoiser call (default: 32, of videos fewer); halved when memory runs out.
        look_frames: of a video, the frames that are looked at: indices, or `first`, `middle`, `last` (all three).
        example: a prompt that the pipeline takes.
        **arguments: of the pipeline's call, by its own names.

    Raises:
        ValueError: the pipeline takes no such argument, or is none that a search can drive; the message says why.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        max_batch: int | None = None,
        look_frames: Sequence[int | str] | None = None,
        example: str = "a",
        **arguments: Any,
    ) -> None:
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max batch must be at least 1, got {max_batch}")
        self.pipe = pipe
        self.taken = taken_by(pipe)
        self.arguments = dict(arguments)
        self._fixed = self._check()
        device: torch.device = pipe._execution_device  # not where the weights of an offloaded model wait
        self._execution_device = device
        self.device = torch.device("cpu") if device.type == "cpu" else device  # `cpu:0` is another name for it
        self.texts: dict[str, Memo] = {}
        self._pictures = Memo(limit=8)
        self._encoders: dict[str, Memo] = {}  # models that encode where no `encode_prompt` does
        self._parts: dict[int, Any] = {}
        self._schedules: dict[Any, Any] = {}
        self._values = Values()
        self._processors = _processors(pipe)
        self._swaps_processors = False
        self._denoised = False  # whether a denoiser ran since a prompt was encoded
        self.some_prompt = example
        self.prelude = ""  # what makes the stock pipeline this one, in Python
        self.notes: list[str] = []  # what whoever sees a result should know
        self.on_calls: Callable[[int], None] | None = None
        self.diversity: Repulsion | None = None  # see ttsnap.diversity.negtome.applied
        self.tap: Tap | None = None  # see ttsnap.pipelines.features.attach
        self.preview: Preview | None = None  # see ttsnap.pipelines.previews.attach
        self.limits = Limits(DEFAULT_BATCH)
        self._said: set[Any] = set()
        self.probe = Probe()
        self._everything = self._stand_ins(models(pipe))
        with warnings.catch_warnings():  # the search itself will say that a prompt is cut
            warnings.simplefilter("ignore")
            self.probe = first_calls(self)
            self._learned(max_batch, look_frames)

    def _check(self) -> dict[str, Any]:
        """Arguments that every call gets, after a check of those that were given."""
        pipe, name, taken = self.pipe, type(self.pipe).__name__, self.taken
        if getattr(pipe, "scheduler", None) is None or not {"prompt", "generator"} <= set(taken):
            raise ValueError(
                f"a search needs a pipeline with a scheduler that takes prompt and generator; {name} is none"
            )
        for argument, value in self.arguments.items():
            if argument in RESERVED:
                raise ValueError(f"{argument} cannot be set: {RESERVED[argument]}")
            if argument not in taken:
                free = [key for key in taken if key not in ("self", "kwargs", *RESERVED)]
                near = difflib.get_close_matches(argument, free, 1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise ValueError(f"{name} takes no {argument}; {hint}it takes {', '.join(free)}")
            if argument == "num_inference_steps" and value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"num_inference_steps must be at least 1, got {value}")
        for model in _attending(pipe).values():
            if getattr(model, "is_cache_enabled", False):
                raise ValueError(
                    f"{name}'s denoiser reuses what it kept of the step before, which would mix candidates; call its "
                    "disable_cache()"
                )
        if is_modular(pipe):
            quieten(pipe.blocks)
        return {"output_type": "np"} if "output_type" in taken else {}

    def _learned(self, max_batch: int | None, look_frames: Sequence[int | str] | None) -> None:
        """What follows from the first calls."""
        probe, name, image = self.probe, type(self.pipe).__name__, self.probe.image
        self.num_steps = probe.num_steps
        self.height, self.width = image.shape[-2:]
        asked = {side: self.arguments[side] for side in ("height", "width") if self.arguments.get(side)}
        if any(value != getattr(self, side) for side, value in asked.items()):
            self.note(
                f"{name} makes images of {self.width} x {self.height} where {asked.get('width', self.width)} x "
                f"{asked.get('height', self.height)} was asked for"
            )
        frames = image.shape[1] if image.ndim == 5 else 0
        self.look_frames: Sequence[int] = chosen_frames(look_frames, frames)
        self.too_big = (
            f"one image of {self.width} x {self.height} does not fit into memory; try a smaller size, bfloat16 or CPU "
            "offloading"
        )
        pixels = self.height * self.width * max(1, frames)
        most = max(1, min(DEFAULT_BATCH, DENOISED_PIXELS // pixels))
        self.limits = Limits(max_batch or most, self.too_big)
        self.limits.start("decode", max(1, min(self.limits.most, DECODED_PIXELS // pixels)))
        self._encoders = {f.name: Memo(limit=16, before=self._make_room) for f in probe.encoders}
        self._parts = self._stand_ins(probe.merged)
        for memo in self.memos:
            memo.forget()  # counting chose other kernels, which round differently
        if not self._tail_holds():
            probe.tail = None
        for (model, _), reason in probe.alone.items():
            self.note(f"{name} runs one candidate at a time: its {model} {reason}")
        if self.arguments.get("negative_prompt") and not probe.guided:
            scale = "true_cfg_scale" if "true_cfg_scale" in self.taken else "guidance_scale"
            self.note(f"{name} ignores the negative prompt with these arguments; a {scale} above 1 would use it")
        for memo in self.memos:
            memo.forget()

    def note(self, text: str) -> None:
        """Keep something that whoever sees a result should know, once."""
        if text not in self.notes:
            self.notes.append(text)

    # What it tells.

    @property
    def max_batch(self) -> int:
        """Most candidates in one denoiser call."""
        return self.limits.most

    @max_batch.setter
    def max_batch(self, limit: int) -> None:
        self.limits.set(limit)

    @property
    def sigmas(self) -> list[float]:
        """Noise level of each call [num_steps]; the x0 estimate after call s belongs to sigmas[s - 1].

        Of flow models the share of noise, 1 to 0; of others the ratio of noise to signal, sqrt((1 - abar) / abar),
        which is the scheduler's sigma: about 14 to 0.03 for Stable Diffusion. Weights of a noise-aware reward are kept
        by it, so they belong to one of the two.
        """
        return [level.noise for level in self.probe.levels]

    @property
    def timesteps(self) -> list[float]:
        """Model time of each step [num_steps], as the scheduler has it."""
        return self.probe.timesteps

    @property
    def passes(self) -> int:
        """Denoiser calls per step, such as 2 where guidance makes one of its own; in a batch of two it is 1."""
        return round(self.probe.passes)

    @property
    def check_tflop(self) -> float:
        """TFLOP of the pipeline's safety checker, if it has one; it sees finished images alone."""
        return self.probe.check_tflop

    def counted(self) -> tuple[float, float, float]:
        """TFLOP of one step, one decode and one encoded prompt, counted in the first call."""
        probe = self.probe
        return probe.step_tflop, probe.tflop["decode"] - probe.check_tflop, probe.tflop["prompt"]

    def call_options(self) -> dict[str, Any]:
        """Arguments, beside prompt and generator, with which the stock pipeline makes the same images."""
        return dict(self.arguments)

    def reproduce(self, prompt: str, seed: int) -> str:
        """A line of Python with which the stock pipeline `pipe` makes the image of a prompt and seed."""
        given = {name: written(name, value) for name, value in self.arguments.items()}
        if "prompt_embeds" not in given:
            first = next(name for name in self.taken if name != "self")
            given = {"" if first == "prompt" and not is_modular(self.pipe) else "prompt": repr(prompt)} | given
        listed = ", ".join(f"{name}={text}" if name else text for name, text in given.items())
        line = f'pipe({listed}, generator=torch.Generator("cpu").manual_seed({seed}))'
        if is_modular(self.pipe):
            line = f'{line[:-1]}, output="images")'
        before = [self.prelude, f"torch.manual_seed({seed})" if self.probe.random else ""]
        return "; ".join([*filter(None, before), line])

    def component(self, name: str) -> Any:
        """A model of the pipeline by name."""
        return getattr(self.pipe, name)  # `components` looks at signatures each time

    @property
    def memos(self) -> list[Memo]:
        """All that is remembered of prompts and pictures."""
        return [*self.texts.values(), *self._encoders.values(), self._pictures]

    def forget_prompts(self) -> None:
        """Drop the cached prompt encodings, and which candidates belong together."""
        for memo in (*self.texts.values(), *self._encoders.values()):
            memo.forget()
        self._values.clear()
        if self.diversity:
            self.diversity.forget()
        if self.tap:
            self.tap.forget_prompts()

    def group(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Say which candidates belong together before some of them start; it only matters with diversity."""
        if self.diversity:
            self.diversity.lead(prompts, seeds)

    # Calls.

    def begin(
        self,
        prompt: str,
        seed: int,
        *,
        standing: Standing | None = None,
        progress: Progress | None = None,
        more: Mapping[str, Any] | None = None,
        everything: bool = False,
        unchecked: bool = False,
    ) -> Call:
        """A call for one candidate, which does not yet run.

        Args:
            prompt: of the candidate.
            seed: its seed.
            standing: where another call stood, to go on from there without its denoiser calls.
            progress: what its schedulers tell (default: a new one).
            more: more arguments of the pipeline's call.
            everything: stop at every model, not only at those that are run in batches.
            unchecked: leave out the safety checker.
        """
        probe = self.probe
        if progress is None:
            progress = Progress(begin=standing, main=probe.main, copies=probe.copies, levels=probe.levels)
        generator = torch.Generator("cpu").manual_seed(seed)
        given = {"prompt": prompt, **own_arguments(self.arguments), **self._fixed, "generator": generator}
        if "prompt_embeds" in given:
            del given["prompt"]
        given |= dict(more or {})

        def dress(own: Any) -> None:
            state = vars(own)
            for name in ENCODERS:
                if callable(getattr(own, name, None)):
                    memo = self._text_memo(f"{type(own).__name__}.{name}")
                    state[name] = memo.wrap(method_of(own, name))
            if unchecked and "safety_checker" in state:
                state["safety_checker"] = None

        parts = self._everything if everything else self._parts
        own = own_copy(self.pipe, progress, parts, self._schedules, dress, self._execution_device)
        return Call(call_of(own, given), prompt, seed, progress, generator, self.device)

    def _stand_ins(self, names: Any) -> dict[int, Any]:
        """What takes the place of a component in a call, by its `id`."""
        parts: dict[int, Any] = {}
        components = models(self.pipe)
        asking = stand_ins(self.pipe, names)
        for name, model in components.items():
            own = asking.get(name)
            if name in self._encoders and own is None:
                own = stand_ins(self.pipe, [name])[name]
                vars(own)["forward"] = self._encoders[name].wrap(model.__call__)
            if own is not None:
                if name == "vae" and callable(getattr(model, "encode", None)):
                    encode: Any = model.encode
                    vars(own)["encode"] = self._pictures.wrap(encode)
                parts[id(model)] = own
        for name, part in self.pipe.components.items():
            if (
                "tokenizer" in name
                and part is not None
                and (own := warning_tokenizer(part, type(self.pipe).__name__, name))
            ):
                parts[id(part)] = own
        return parts

    def _text_memo(self, name: str) -> Memo:
        """What is remembered of an encoding method."""
        if name not in self.texts:
            self.texts[name] = Memo(before=self._make_room, count=self._pictures.count)
        return self.texts[name]

    def _make_room(self) -> None:
        """Before something is encoded: of an offloaded pipeline, send the denoiser away, or both would be there."""
        if self._denoised and hasattr(self.pipe, "_offload_device"):
            self.pipe.maybe_free_model_hooks()
            self._denoised = False

    def work(self, ask: Ask) -> Any:
        """Run a model; it may change lists that it is given (as UNets do with a T2I adapter's), but not the ask's."""
        model = self.component(ask.model)
        target = model if ask.method == "forward" else getattr(model, ask.method)
        return target(*own_containers(ask.args), **own_containers(ask.kwargs))

    def turn(self, calls: Sequence[Waiting]) -> Sequence[Waiting]:
        """Let calls go on until each waits for a model or has arrived; then run the batch that fills best.

        Of what can be merged, the group is taken that fills a batch best; of several, the one with the later step.
        Errors are kept in the calls they belong to.

        Returns:
            Those that were in the batch.

        Raises:
            MemoryError: not even one candidate fits into memory.
        """
        self.go_on(calls)
        groups: dict[Any, list[Waiting]] = {}
        for call in calls:
            if call.ask is not None and call.error is None:
                groups.setdefault(self._key(call), []).append(call)
        if not groups:
            return []
        if len(groups) > 1:
            self._note_differences(groups)
        limits = {key: self.limits.of(self._kind(group[0])) for key, group in groups.items()}
        best = max(groups, key=lambda key: (min(1.0, len(groups[key]) / limits[key]), max(c.step for c in groups[key])))
        group = sorted(groups[best], key=lambda call: call.step)  # so that cohorts meet, and later batches are full
        while group:
            part = group[: self.limits.of(self._kind(group[0]))]
            try:
                self._run(part)
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise MemoryError(self.too_big) from error
            except Exception as error:  # of one alone; others run one by one first
                for call in part:
                    call.error = error
                break
            else:
                break
            # Outside the handler, where the error no longer holds on to the tensors of the failed batch.
            self.limits.halve(self._kind(part[0]), len(part))
        self.go_on(part)
        return part

    def bring(self, calls: Sequence[Waiting]) -> None:
        """Bring calls to their targets.

        Raises:
            ValueError: the pipeline did not like what it was given.
            RuntimeError: the pipeline failed; the message names prompt and seed.
            MemoryError: a candidate does not fit into memory.
        """
        while not all(call.arrived for call in calls):
            self.turn(calls)
        for call in calls:
            if call.error is not None:
                raise self.explained(call)

    def explained(self, call: Waiting) -> Exception:
        """The error of a call, which names the candidate."""
        error = call.error
        if isinstance(error, torch.OutOfMemoryError):
            return MemoryError(self.too_big)
        kind = ValueError if isinstance(error, ValueError | TypeError) else RuntimeError
        said = str(error) or type(error).__name__
        made = kind(f"{type(self.pipe).__name__}, prompt {call.prompt!r}, seed {call.seed}: {said}")
        made.__cause__ = error
        return made

    def _kind(self, call: Waiting) -> str:
        """How limits call an ask."""
        assert call.ask is not None
        return "decode" if call.ask.method == "decode" else "calls"

    def go_on(self, calls: Sequence[Waiting]) -> None:
        """Let calls go on until each waits for a model, or has arrived."""
        made = 0
        with random_kept(self._execution_device):
            for call in calls:
                if call.ask is not None or call.arrived:
                    continue
                if isinstance(call, Drawing):
                    call.forward()
                    continue
                before = call.progress.paid
                if self._swaps_processors:
                    self._with_processors(call, call.forward)
                else:
                    call.forward()
                if call.progress.begin is not None:
                    self._skip(call)
                made += call.progress.paid - before
        if made and self.on_calls:
            self.on_calls(made)

    def _skip(self, call: Call) -> None:
        """Answer zeros to a call that makes steps which another has made, until it stands where that did."""
        while call.progress.skipping and call.ask is not None and call.ask.model in self.probe.loop:
            call.answer(zeros(self.probe.like(call.ask).answer))
            call.forward()

    def _key(self, call: Waiting) -> Any:
        """What calls have in common that can be merged."""
        ask = call.ask
        assert ask is not None
        if ask.key is None:
            layout = self.probe.layout(ask)
            if layout is None or ask.kind in self.probe.alone:
                ask.key = (*ask.kind, id(call))
            else:
                time = (call.step, call.passes) if self._pushed(call) else None  # type: ignore[union-attr]
                ask.key = (
                    *ask.kind,
                    time,
                    getattr(call, "autocast", None),
                    batching.key(ask.tree, layout, self._values)
                    if (ask.form, layout.rows) in self.probe.sure
                    else batching.shapes(ask.tree),
                )
        return ask.key

    def _pushed(self, call: Waiting) -> bool:
        """Whether a candidate is pushed from others in what it asks for."""
        ask, diversity = call.ask, self.diversity
        if diversity is None or not isinstance(call, Call) or ask is None or ask.method != "forward":
            return False
        return ask.model in self.probe.denoisers and diversity.active(self, call)

    def _note_differences(self, groups: Mapping[Any, Sequence[Waiting]]) -> None:
        """Say which argument keeps candidates of one prompt at one step apart."""
        heads: dict[Any, Waiting] = {}
        for group in groups.values():
            ask = group[0].ask
            if ask is None or ask.kind in self.probe.alone:
                continue
            like = (ask.form, group[0].prompt, group[0].step)
            other = heads.setdefault(like, group[0])
            layout = self.probe.layout(ask)
            if other is group[0] or layout is None or other.ask is None or ask.form in self._said:
                continue
            place = batching.difference(other.ask.tree, ask.tree, layout, self._values)
            if place is not None:
                self._said.add(ask.form)
                argument = batching.named(place)
                self.note(
                    f"{type(self.pipe).__name__} runs candidates in separate batches where the {argument} of its "
                    f"{ask.model} differs"
                )

    def _run(self, calls: Sequence[Waiting]) -> None:
        """Run what calls that can be merged ask for."""
        first = calls[0]
        asks = [call.ask for call in calls if call.ask is not None]
        layout = self.probe.layout(asks[0]) or Layout(1, {})
        denoiser = asks[0].method == "forward"
        self._denoised |= denoiser
        hearing = None
        if denoiser and self.tap and asks[0].model in self.probe.denoisers:
            hearing = [call for call in calls if isinstance(call, Call) and call.heard != call.step]
        pushing: Any = nullcontext()
        if self.diversity and self._pushed(first):
            candidates = [call for call in calls if isinstance(call, Call)]
            pushing = self.diversity.pushing(self, candidates)
            asks += self.diversity.asks(self, candidates)
        hear = self.tap.listen([call.prompt for call in calls]) if self.tap and hearing else nullcontext()
        with self._processors_of(first), pushing, self._autocast_of(first), hear as heard:
            parts = self._parts_of(calls, asks, layout)
        if parts is None:  # they cannot be merged; each runs alone from now on
            for ask in asks:
                ask.key = None
            return
        for number, (call, part) in enumerate(zip(calls, parts[: len(calls)], strict=True)):
            if heard and hearing and call in hearing:
                call.cells, call.heard = heard[0][number : number + 1], call.step
            if denoiser and isinstance(call, Call) and asks[0].model in self.probe.denoisers:
                call.count_pass()
            call.answer(part)
        if self.diversity and len(asks) > len(calls):
            self.diversity.answered(asks[len(calls) :], parts[len(calls) :])

    def _parts_of(self, calls: Sequence[Waiting], asks: Sequence[Ask], layout: Layout) -> list[Any] | None:
        """Answers to asks that are run as one; None where that cannot be."""
        first, ask, name = calls[0], asks[0], (asks[0].form, layout.rows)
        if len(asks) == 1:
            drawing = ask.kind in self.probe.alone and isinstance(first, Call)
            answer = first.within(lambda: self.work(ask)) if drawing else self.work(ask)  # type: ignore[union-attr]
            return [self._finite(answer, ask, calls, layout)]
        sure = name in self.probe.sure
        if sure and not self._masked(calls, asks, layout):
            return None
        alone = None if sure else self.work(ask)
        trouble: Exception | None = None
        for guess in [layout] if sure else self.probe.guesses.get(name, [layout]):
            if not sure and len({batching.key(other.tree, guess, self._values) for other in asks}) > 1:
                continue
            try:
                parts = self._merged(calls, asks, guess)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                trouble = error
                continue
            if sure or _close(parts[0], alone):
                known = self.probe.layouts[ask.form]
                known[known.index(layout)] = guess
                self.probe.sure.add(name)
                return parts
        if len(calls) == 1:  # with a reference, which it cannot run without
            raise trouble or RuntimeError(f"the {ask.model} does not run in batches, which pushing apart needs")
        self._never_again(ask, asks[1], layout, trouble)
        return None

    def _masked(self, calls: Sequence[Waiting], asks: Sequence[Ask], layout: Layout) -> bool:
        """Whether texts of these lengths can be merged; the first time a masked text is compared with the plain one."""
        texts, name = batching.texts(layout), (asks[0].form, layout.rows)
        if not texts or name in self.probe.masked:
            return True
        lengths = [tuple(ask.tree[text].shape[1] for text, _ in texts) for ask in asks]
        if len(set(lengths)) == 1:
            return True
        short, long = (asks[lengths.index(choose(lengths))] for choose in (min, max))
        with suppress(Unlike, RuntimeError, ValueError, TypeError, IndexError):
            if _close(self._merged(calls[:2], [short, long], layout)[0], self.work(short), exactly=True):
                self.probe.masked.add(name)
                return True
        batching.unmark_texts(layout)
        return False

    def _never_again(self, ask: Ask, other: Ask, layout: Layout, trouble: Exception | None) -> None:
        """Do not try to merge such asks again; says why."""
        place = batching.difference(ask.tree, other.tree, layout, self._values)
        reason = f"does not run in batches ({trouble})"
        if trouble is None and place:
            reason = f"takes one {batching.named(place)} for the whole batch, and candidates differ in it"
        elif trouble is None:
            reason = "does not give a candidate in a batch what it gives it alone"
        self.probe.alone[ask.kind] = reason
        self.note(f"{type(self.pipe).__name__} runs one candidate at a time: its {ask.model} {reason}")

    def _merged(self, calls: Sequence[Waiting], asks: Sequence[Ask], layout: Layout) -> list[Any]:
        trees = batching.padded([ask.tree for ask in asks], layout)
        merged = asks[0].filled(batching.merge(trees, layout))
        return batching.split(self._finite(self.work(merged), merged, calls, layout), len(asks), layout)

    def _finite(self, answer: Any, ask: Ask, calls: Sequence[Waiting], layout: Layout) -> Any:
        """What a decoder answered, if all of it is finite; else what it answers in fp32.

        Calls whose picture is not finite even then fail.
        """
        if ask.method != "decode" or not _infinite(answer):
            return answer
        model = self.component(ask.model)
        dtype = getattr(model, "dtype", torch.float32)
        if dtype in (torch.float16, torch.bfloat16):
            model.to(torch.float32)
            try:
                wide = ask.filled({name: _widened(value) for name, value in ask.tree.items()})
                answer = self.work(wide)
            finally:
                model.to(dtype)
            self.note(
                f"the decoder overflows in {str(dtype).removeprefix('torch.')}; such pictures were decoded in fp32"
            )
        if _infinite(answer):
            parts = [answer] if len(calls) == 1 else batching.split(answer, len(calls), layout)
            for call, part in zip(calls, parts, strict=True):
                if _infinite(part):
                    call.error = ValueError(
                        f"the picture at step {call.step} of {self.num_steps} is not finite (its decoder or its "
                        "denoiser overflowed); try float32 or bfloat16"
                    )
        return answer

    # Attention processors, which some pipelines put into the shared models for the time of their call.

    def notice_processors(self) -> None:
        """Remember whether the pipeline has put processors of its own into its models."""
        self._swaps_processors |= _processors(self.pipe) != self._processors

    def reset_processors(self) -> None:
        """Put back those that were there."""
        if self._swaps_processors:
            _set_processors(_attending(self.pipe), self._processors)

    def _with_processors(self, call: Call, work: Callable[[], None]) -> None:
        attending = _attending(self.pipe)
        if call.processors:
            _set_processors(attending, call.processors)
        try:
            work()
            call.processors = _processors(self.pipe)
        finally:
            _set_processors(attending, self._processors)

    @contextmanager
    def _processors_of(self, call: Waiting) -> Iterator[None]:
        if self._swaps_processors and isinstance(call, Call) and call.processors:
            _set_processors(_attending(self.pipe), call.processors)
        try:
            yield
        finally:
            self.reset_processors()

    @contextmanager
    def _autocast_of(self, call: Waiting) -> Iterator[None]:
        dtype = getattr(call, "autocast", None)
        with torch.autocast(self.device.type, dtype) if dtype else nullcontext():
            yield

    # Candidates.

    def start(self, prompts: Sequence[str], seeds: Sequence[int]) -> Trajectories:
        """Candidates at step 0, whose calls have not begun; the noise of each depends on its seed alone."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds need as many prompts, got {len(prompts)}")
        self.some_prompt = next(iter(prompts), self.some_prompt)
        if self.diversity:
            self.diversity.meet(prompts, seeds)
        nothing = torch.empty(len(seeds), 0, device=self.device)
        return Trajectories(tuple(prompts), tuple(seeds), 0, nothing, calls=(None,) * len(seeds))

    @torch.no_grad()
    def advance(self, trajectories: Trajectories, to_step: int) -> Trajectories:
        """Bring all candidates to `to_step`, in full batches.

        A call only goes forward: from a step that its call has left behind, a candidate is made again from its seed,
        with the same result. In another thread than the one that began it, a new call takes up where it stands.

        Raises:
            ValueError: the step is not ahead or beyond the last, or the pipeline did not like what it was given.
            RuntimeError: the pipeline failed; the message names prompt and seed.
            MemoryError: a candidate does not fit into memory.
        """
        if not trajectories.step < to_step <= self.num_steps:
            raise ValueError(f"to_step must be in {trajectories.step + 1}..{self.num_steps}, got {to_step}")
        calls = [self._resumable(trajectories, row) for row in range(len(trajectories))]
        self.aim(calls, to_step)
        self.bring(calls)
        return self.gather(calls, to_step)

    def _resumable(self, trajectories: Trajectories, row: int) -> Call:
        call, prompt, seed = trajectories.calls[row], trajectories.prompts[row], trajectories.seeds[row]
        stands = call is not None and call.error is None and call.step == trajectories.step and call.progress.last
        if call is None or not stands:
            return self.begin(prompt, seed)
        return call if call.here else self.begin(prompt, seed, standing=call.standing())

    def aim(self, calls: Sequence[Call], step: int) -> None:
        """Let calls go on to a step (END: to their end)."""
        for call in calls:
            call.progress.target = step

    def gather(self, calls: Sequence[Call], step: int) -> Trajectories:
        """Calls that stand at a step as trajectories."""
        prompts, seeds = tuple(call.prompt for call in calls), tuple(call.seed for call in calls)
        lasts = [call.progress.last for call in calls]
        for call, last in zip(calls, lasts, strict=True):
            if last is None or call.step != step:
                raise RuntimeError(
                    f"{type(self.pipe).__name__}, prompt {call.prompt!r}, seed {call.seed}: the call ended after "
                    f"{call.step} of {self.num_steps} steps"
                )
        if self.probe.copies:
            empty = torch.empty(len(calls), 0, device=self.device)
            return Trajectories(prompts, seeds, step, empty, None, None, tuple(calls))
        following = [last.following for last in lasts if last]
        latents = torch.cat(following) if self.probe.batched else torch.stack(following)
        if step == self.num_steps:
            x0 = latents.float()
        else:
            cleaned = [last.clean for last in lasts if last]
            x0 = torch.cat(cleaned) if self.probe.batched else torch.stack(cleaned)
        heard = [call.cells for call in calls if call.cells is not None and call.heard == step - 1]
        cells = torch.cat(heard) if len(heard) == len(calls) and heard else None
        return Trajectories(prompts, seeds, step, latents, x0, cells, tuple(calls))

    # Pictures.

    def preview_at(self, step: int) -> Preview | None:
        """What makes the pictures of looks after `step` calls; None: the full decoder, as for every finished image."""
        preview = self.preview
        return preview if preview and step < self.num_steps and step <= preview.until else None

    @torch.no_grad()
    def look(self, trajectories: Trajectories) -> Tensor:
        """Images [n, 3, h, w] (videos [n, frames, 3, h, w]) of candidates; of finished ones what their calls return.

        Of x0 estimates they are what the pipeline makes of these, or a preview's pictures, of its own size. The
        pipeline's safety checker, if it has one, sees finished images alone; a warning says which it made black.
        """
        step, x0 = trajectories.step, trajectories.x0
        if step == self.num_steps:
            return self._finished(trajectories)
        if x0 is None:
            raise ValueError(f"{type(self.pipe).__name__} shows no x0 estimates; use best-of-n")
        if preview := self.preview_at(step):
            spatial = self.spatial(x0, trajectories.prompts, trajectories.seeds, step)
            return torch.cat(self.limits.run("previews", len(x0), lambda rows: preview(self, spatial[rows])))
        return self._drawn(self._drawings(x0, trajectories.prompts, trajectories.seeds, step))

    def _finished(self, trajectories: Trajectories) -> Tensor:
        calls: list[Waiting] = []
        for row, call in enumerate(trajectories.calls):
            stands = call is not None and call.here and call.error is None and call.progress.last is not None
            if call is None or not stands or call.step != self.num_steps:
                prompt, seed = trajectories.prompts[row], trajectories.seeds[row]
                if self.exact and trajectories.x0 is not None:
                    calls += self._drawings(trajectories.x0[row : row + 1], [prompt], [seed], self.num_steps, False)
                    continue
                call = self.begin(prompt, seed)
            call.progress.target = END
            calls.append(call)
        return self._drawn(calls)

    def _drawn(self, drawings: Sequence[Waiting]) -> Tensor:
        """Bring calls or drawings to their end, and see what they made."""
        self.bring(drawings)
        images = []
        for drawing in drawings:
            warn_of_blanks(objections(drawing.output) or [False], [drawing.prompt], [drawing.seed])
            images.append(as_images(drawing.output, self.device))
            drawing.output = None
        made = torch.cat(images)
        if not bool(torch.isfinite(made).all()):
            wrong = next(d for d, image in zip(drawings, images, strict=True) if not bool(torch.isfinite(image).all()))
            raise ValueError(
                f"prompt {wrong.prompt!r}, seed {wrong.seed}: the picture at step {wrong.step} of {self.num_steps} is "
                "not finite; try float32 or bfloat16"
            )
        return made

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] (videos [n, frames, 3, h, w]) in 0..1, fp32, of predicted clean latents [n, ...]."""
        nobody = [self.some_prompt] * len(x0), [0] * len(x0)
        return self._drawn(self._drawings(x0, *nobody, self.num_steps))

    def _drawings(
        self, x0: Tensor, prompts: Sequence[str], seeds: Sequence[int], step: int, unchecked: bool = True
    ) -> list[Waiting]:
        """What makes pictures of x0 estimates [n, ...]: operations that are known, or else calls."""
        tail = self.probe.tail
        if tail is None:
            return [
                self._tail_call(x0[row : row + 1], prompt, seed, unchecked=unchecked)
                for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            ]
        dtype = self._latents_dtype()
        rows = torch.split(x0.to(dtype), 1) if self.probe.batched else x0.to(dtype).unbind(0)
        return [
            Drawing(tail.run(row), prompt, seed, step) for row, prompt, seed in zip(rows, prompts, seeds, strict=True)
        ]

    def _latents_dtype(self) -> torch.dtype:
        result = self.probe.result
        values = result if isinstance(result, tuple) else tuple(result.values())
        return next(value.dtype for value in values if getattr(value, "shape", None) == self.probe.sample)  # type: ignore[no-any-return]

    def _tail_call(self, x0: Tensor, prompt: str, seed: int, *, unchecked: bool = False) -> Call:
        """A call that makes a picture of an x0 estimate [1, ...]: its steps are not made, and the last returns it."""
        x0 = x0 if self.probe.batched else x0[0]
        result = self.probe.result

        def put(value: Any) -> Any:
            if getattr(value, "shape", None) == self.probe.sample:
                return x0.to(value.device, value.dtype)
            return zeros(value)

        values = tuple(map(put, result if isinstance(result, tuple) else result.values()))
        call = self.begin(prompt, seed, standing=Standing(prompt, seed, self.num_steps, values), unchecked=unchecked)
        call.progress.target = END
        return call

    @torch.no_grad()
    def spatial(
        self, x0: Tensor, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None, step: int = 0
    ) -> Tensor:
        """Predicted clean latents as the pipeline hands them to its decoder [n, channels, h, w].

        Raises:
            ValueError: it hands it no pictures.
        """
        texts = prompts or [self.some_prompt] * len(x0)
        found = []
        for drawing in self._drawings(x0, texts, seeds or [0] * len(x0), step):
            self.go_on([drawing])
            if drawing.error:
                raise self.explained(drawing)
            latents = self._to_decoder(drawing.ask)
            if latents is None:
                raise ValueError(f"{type(self.pipe).__name__} has no previews; its looks need the full decoder")
            found.append(latents)
        return torch.cat(found)

    @staticmethod
    def _to_decoder(ask: Ask | None) -> Tensor | None:
        """The latents [1, channels, h, w] in what is asked of a decoder."""
        if ask is None or ask.method != "decode":
            return None
        latents = next((value for value in ask.tree.values() if isinstance(value, Tensor)), None)
        if latents is not None and latents.ndim == 5 and latents.shape[2] == 1:
            latents = latents[:, :, 0]
        return latents if latents is not None and latents.ndim == 4 else None

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser sees them, of latents [n, channels, h, w] as the decoder takes them."""
        config = self.pipe.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            shift, scale = (torch.tensor(v, device=latents.device).reshape(1, -1, 1, 1) for v in (mean, std))
            return (latents - shift) / scale
        scaled: Tensor = (latents - (getattr(config, "shift_factor", None) or 0.0)) * getattr(
            config, "scaling_factor", 1.0
        )
        return scaled

    @torch.no_grad()
    def decode_spatial(self, latents: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 (fp32) of latents [n, channels, h, w] of any size, as the decoder takes them."""
        vae = self.pipe.vae
        way = self._asked_of_decoder()

        def work(rows: slice) -> Tensor:
            part = latents[rows].to(vae.dtype)
            answer = self.work(
                way.filled({**way.tree, self._place_of(way): part[:, :, None] if self._flat_frames else part})
            )
            made = answer[0] if isinstance(answer, tuple) else answer.sample
            made = made[:, :, 0] if made.ndim == 5 else made
            unit: Tensor = (made.float() / 2 + 0.5).clamp(0, 1)
            return unit

        return torch.cat(self.limits.run("decode", len(latents), work))

    def _asked_of_decoder(self) -> Ask:
        forward = next((f for f in self.probe.forwards if f.ask.method == "decode"), None)
        if forward is None or not hasattr(self.pipe, "vae"):
            raise ValueError(f"{type(self.pipe).__name__} has no small preview; its looks need the full decoder")
        return forward.ask

    def _place_of(self, ask: Ask) -> Any:
        return next(name for name, value in ask.tree.items() if hasattr(value, "shape"))

    @property
    def _flat_frames(self) -> bool:
        """Whether the decoder takes a picture as a video of one frame."""
        ask = self._asked_of_decoder()
        return len(ask.tree[self._place_of(ask)].shape) == 5

    def encode_spatial(self, images: Tensor) -> Tensor:
        """Latents [n, channels, h, w] of images [n, 3, h, w] in 0..1; what `decode_spatial` turns back.

        Raises:
            ValueError: the decoder has no such encoder.
        """
        vae: Any = getattr(self.pipe, "vae", None)
        if not callable(getattr(vae, "encode", None)) or self._flat_frames:
            raise ValueError(f"{type(self.pipe).__name__} has no linear preview; use full, tiny or small")
        found = vae.encode((images * 2 - 1).to(self.device, vae.dtype))
        return found.latents if hasattr(found, "latents") else found.latent_dist.mode()  # type: ignore[no-any-return]

    def shown(self, images: Tensor) -> Tensor:
        """The part of decoded images that is judged: all; of videos, the frames that are looked at."""
        return images[:, list(self.look_frames)] if self.look_frames else images

    def features(self, trajectories: Trajectories) -> Features:
        """What the denoiser knows of the candidates after their last call, for rewards that read it.

        Raises:
            ValueError: nothing listened to that call.
        """
        from ttsnap.pipelines.features import Features

        if self.tap is None or trajectories.cells is None:
            raise ValueError("no features were kept of these candidates; attach the rewards that read them first")
        return Features(trajectories.cells, self.tap.words(trajectories.prompts), trajectories.x0)

    # What was taken down of the way to a picture must hold for every candidate.

    exact = True  # whether a picture can be made of last latents without their call

    @torch.no_grad()
    def _tail_holds(self) -> bool:
        """Whether calls of two seeds and what was taken down do the same with last latents.

        Sees also whether a call that is given last latents does with them what the one did that made them.
        """
        probe = self.probe
        if probe.copies:
            self.exact = False
            return False
        whole = probe.latents if probe.batched else probe.latents[None]
        try:
            one, other = (self._tail_asks(self._tail_call(whole, self.some_prompt, seed)) for seed in (0, 1))
        except Exception:
            self.exact = False
            return False
        draws = probe.alone.keys() & {f.ask.kind for f in probe.forwards if f.ask.method == "decode"}
        self.exact = not draws and (probe.decoded is None or _alike(one[:1], [probe.decoded]))
        probe.decoded = None
        if not self.exact:
            self.note(
                f"{type(self.pipe).__name__} draws noise when it decodes, or decodes more than its last latents: early "
                "looks show about what it would make of an x0 estimate; finished images are exact"
            )
            return False
        if probe.tail is None:
            return False
        ours = self._tail_asks(Drawing(probe.tail.run(probe.latents), self.some_prompt, 0, self.num_steps))
        return _alike(ours, one) and _alike(ours, other)

    def _tail_asks(self, call: Waiting) -> list[Ask]:
        """What is asked for on the way from the last latents to the picture, answered by noise; at last the picture."""
        asks: list[Ask] = []
        while True:
            self.go_on([call])
            if call.error:
                raise call.error
            if call.ask is None:
                break
            after = isinstance(call, Drawing) or call.step >= self.num_steps
            if not after:
                call.answer(self.work(call.ask))
                continue
            asks.append(call.ask)
            call.answer(_noise(self.probe.like(call.ask).answer))
        asks.append(Ask("", "", (as_images(call.output, self.device),), {}))
        return asks


def _noise(answer: Any) -> Any:
    """An answer of the same random numbers every time, in the place of one without data."""

    def fill(x: Any) -> Any:
        if not isinstance(x, Blank) or not x.dtype.is_floating_point:
            return zeros(x)
        generator = torch.Generator().manual_seed(1)
        return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)

    return tree_map(fill, answer)


def _close(mine: Any, theirs: Any, exactly: bool = False) -> bool:
    """Whether two answers are equal but for the rounding of a batch; `exactly`: and of nothing more."""
    a, b = (tree_leaves(answer) for answer in (mine, theirs))
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Tensor) and x.is_floating_point():
            if x.shape != y.shape:
                return False
            size, error = y.float().abs().mean(), (x.float() - y.float()).abs().mean()
            most = 1e-4 if exactly and x.dtype == torch.float32 else 0.02
            if not bool(error <= most * size + 1e-6):
                return False
    return True


def _alike(mine: Sequence[Ask], theirs: Sequence[Ask]) -> bool:
    """Whether the same was asked for."""

    def tree(ask: Ask) -> Any:
        return {name: value for name, value in ask.tree.items() if not isinstance(value, torch.Generator)}

    return len(mine) == len(theirs) and all(
        a.kind == b.kind and same(tree(a), tree(b)) for a, b in zip(mine, theirs, strict=True)
    )


def _infinite(answer: Any) -> bool:
    """Whether any number in an answer is not finite."""
    numbers = [x for x in tree_leaves(getattr(answer, "sample", answer)) if isinstance(x, Tensor)]
    return any(x.is_floating_point() and not bool(torch.isfinite(x).all()) for x in numbers)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _attending(pipe: Any) -> dict[str, Any]:
    """The models of a pipeline whose attention processors can be changed."""
    names = ("unet", "transformer", "transformer_2")
    return {name: model for name in names if hasattr(model := getattr(pipe, name, None), "attn_processors")}


def _processors(pipe: Any) -> dict[str, dict[str, Any]]:
    """Attention processors by model and place; they are compared by identity."""
    return {name: dict(model.attn_processors) for name, model in _attending(pipe).items()}


def _set_processors(attending: Mapping[str, Any], processors: Mapping[str, Any]) -> None:
    for name, model in attending.items():
        model.set_attn_processor(dict(processors[name]))


__all__ = ["Drawing", "Sampler", "Trajectories"]
