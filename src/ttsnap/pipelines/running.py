"""Runs what suspended calls ask for: asks that can be merged, in one batch."""

from __future__ import annotations

import difflib
import inspect
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ttsnap.pipelines import batching
from ttsnap.pipelines.batching import Layout, Seen, Unlike, Values
from ttsnap.pipelines.caches import Cache
from ttsnap.pipelines.call import (
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
    stand_ins,
    taken_by,
)
from ttsnap.pipelines.features import Tap
from ttsnap.pipelines.limits import Limits
from ttsnap.pipelines.probe import Probe, more_than_numbers, zeros
from ttsnap.pipelines.standing import Standing
from ttsnap.pipelines.text import warning_tokenizer

if TYPE_CHECKING:
    from ttsnap.pipelines.replicas import Replicas

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


class Pushing(Protocol):
    """What pushes candidates apart while their denoiser works; see `ttsnap.pipelines.negtome`."""

    parameters: Any

    def active(self, sampler: Any, call: Call) -> bool:
        """Whether a candidate is pushed in what it asks for."""
        ...

    def asks(self, sampler: Any, calls: Sequence[Call]) -> list[Ask]:
        """What is to run along in the batch of these candidates."""
        ...

    def pushing(self, sampler: Any, calls: Sequence[Call]) -> AbstractContextManager[None]:
        """Push, inside, in the batch of these candidates."""
        ...

    def answered(self, asks: Sequence[Ask], answers: Sequence[Any]) -> None:
        """What ran along was answered."""
        ...

    def lead(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """These candidates belong together."""
        ...

    def meet(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """These candidates start."""
        ...

    def forget(self) -> None:
        """Forget all candidates."""
        ...


class Runner:
    """Calls of one stock pipeline, and batches of what they ask for.

    Args:
        pipe: the pipeline.
        example: a prompt that it takes.
        arguments: of its call, by its own names.

    Attributes:
        notes: shown with every result.
        on_calls: is told of every step that was made.
        diversity: pushes candidates apart.
        tap: listens to the denoiser for rewards that read features.
        cache: lets denoiser calls do without a part of their work.
        probe: what the first calls told.
        limits: how many candidates are run together.
        replicas: of the models on other devices, which run batches, too.
        compiled: names of models that were compiled: their batches are of few sizes.

    Raises:
        ValueError: the pipeline takes no such argument, or is none that a search can drive; the message says why.
    """

    def __init__(self, pipe: Any, example: str, arguments: Mapping[str, Any]) -> None:
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
        self.notes: list[str] = []
        self.on_calls: Callable[[int], None] | None = None
        self.diversity: Pushing | None = None
        self.tap: Tap | None = None
        self.cache: Cache | None = None
        self.replicas: Replicas | None = None
        self.compiled: frozenset[str] = frozenset()
        self.limits = Limits(DEFAULT_BATCH)
        self.too_big = "one image does not fit into memory"
        self._said: set[Any] = set()
        self._keeping: dict[Any, bool] = {}
        self.probe = Probe()
        self._everything = self._stand_ins(models(pipe))

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
                    "disable_cache(), and give the same cache to the search, such as cache='FirstBlock,threshold=.1'"
                )
        if is_modular(pipe):
            quieten(pipe.blocks)
        return {"output_type": "np"} if "output_type" in taken else {}

    def note(self, text: str) -> None:
        """Keep a note for the results, once."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def num_steps(self) -> int:
        """Steps of the pipeline's scheduler for a finished image."""
        return self.probe.num_steps

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
        call = Call(call_of(own, given), prompt, seed, progress, generator, self.device)
        call.pipe = weakref.ref(own)
        return call

    def _stand_ins(self, names: Any) -> dict[int, Any]:
        """What takes the place of a component in a call, by its `id`."""
        parts: dict[int, Any] = {}
        components = models(self.pipe)
        asking = stand_ins(self.pipe, names)
        for name, model in components.items():
            own = asking.get(name)
            if name in self._encoders and own is None:
                own = stand_ins(self.pipe, [name])[name]
                remembered: Any = self._encoders[name].wrap(model.__call__)
                remembered.__signature__ = inspect.signature(model.forward)  # a model that generates looks at it
                vars(own).update(forward=remembered, _compiled_call_impl=remembered)
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

    def turn(self, calls: Sequence[Waiting]) -> list[Sequence[Waiting]]:
        """Let calls go on until each waits for a model or has arrived; then run the batch that fills best.

        Of what can be merged, the group is taken that fills a batch best; of several, the one with the later step.
        Errors are kept in the calls they belong to.

        Returns:
            Those that were in the batch. With replicas there are several; on the CPU they are told apart, so that what
            comes after them does not depend on how many ran at the same time, either.

        Raises:
            MemoryError: not even one candidate fits into memory.
        """
        self.go_on(calls)
        groups: dict[Any, list[Waiting]] = {}
        for call in calls:
            if call.ask is not None and call.error is None:
                groups.setdefault(self._key(call), []).append(call)
        if not groups:
            return [[]]
        if len(groups) > 1:
            self._note_differences(groups)
        limits = {key: self.limits.of(self.kind(group[0])) for key, group in groups.items()}
        best = max(groups, key=lambda key: (min(1.0, len(groups[key]) / limits[key]), max(c.step for c in groups[key])))
        group = sorted(groups[best], key=lambda call: call.step)  # so that cohorts meet, and later batches are full
        if self.replicas and (parts := self.replicas.deal(self, group)):
            self.replicas.run(self, parts)
        else:
            while not self.attempt(part := group[: self.limits.of(self.kind(group[0]))]):
                pass
            parts = [part]
        ran = [call for part in parts for call in part]
        self.go_on(ran)
        return parts if self.device.type == "cpu" else [ran]

    def attempt(self, calls: Sequence[Waiting], run: Callable[[], None] | None = None) -> bool:
        """Run a batch; false where it does not fit into memory: its calls wait on, and the next are smaller.

        Args:
            calls: those in the batch; what goes wrong is kept in them.
            run: has them answered (default: the models here).

        Raises:
            MemoryError: not even one candidate fits into memory.
        """
        try:
            run() if run else self._run(calls)
        except torch.OutOfMemoryError as error:
            if len(calls) == 1:
                raise MemoryError(self.too_big) from error
        except Exception as error:  # of one alone; others run one by one first
            for call in calls:
                call.error = error
            return True
        else:
            return True
        # Outside the handler, where the error no longer holds on to the tensors of the failed batch.
        self.limits.halve(self.kind(calls[0]), len(calls))
        return False

    def shared(self, calls: Sequence[Waiting]) -> Layout | None:
        """How what calls ask for is merged, where that can be done elsewhere; None where it has to be done here."""
        ask = calls[0].ask
        assert ask is not None
        layout = self.probe.layout(ask)
        if layout is None or ask.kind in self.probe.alone or (ask.form, layout.rows) not in self.probe.sure:
            return None
        asks = [call.ask for call in calls if call.ask is not None]
        if self._swaps_processors or self._pushed(calls[0]) or not self._masked(calls, asks, layout):
            return None
        return layout

    def hearing(self, calls: Sequence[Waiting]) -> list[Call]:
        """Candidates whose features are to be kept of what they ask for."""
        ask = calls[0].ask
        if ask is None or ask.method != "forward" or not self.tap or ask.model not in self.probe.denoisers:
            return []
        return [call for call in calls if isinstance(call, Call) and call.heard != call.step]

    def answered(self, calls: Sequence[Waiting], answer: Any, cells: Tensor | None) -> None:
        """Hand out what was answered elsewhere to calls that can be merged, and the features [n, ...] that were heard.

        A picture that is not finite is decoded again here, where more can be tried.
        """
        asks = [call.ask for call in calls if call.ask is not None]
        layout = self.probe.layout(asks[0]) or Layout(1, {})
        if asks[0].method == "decode" and _infinite(answer):
            self._run(calls)
            return
        self._denoised |= asks[0].method == "forward"
        parts = [answer] if len(asks) == 1 else batching.split(answer, len(asks), layout)
        self._hand_out(calls, parts, self.hearing(calls), cells)

    def _hand_out(
        self, calls: Sequence[Waiting], parts: Sequence[Any], hearing: Sequence[Call], cells: Tensor | None
    ) -> None:
        ask = calls[0].ask
        counts = ask is not None and ask.method == "forward" and ask.model in self.probe.denoisers
        for number, (call, part) in enumerate(zip(calls, parts, strict=True)):
            if cells is not None and call in hearing:
                call.cells, call.heard = cells[number : number + 1], call.step  # type: ignore[union-attr]
            if counts and isinstance(call, Call):
                call.count_pass()
            call.answer(part)

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

    def kind(self, call: Waiting) -> str:
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
        """Answer zeros to a call that makes steps which another has made, until it stands where that did.

        A denoiser that answers with more than numbers, such as a cache of its keys for later steps, has to work again.
        """
        while call.progress.skipping and call.ask is not None and call.ask.model in self.probe.loop:
            if self._keeps(call.ask):
                call.again += 1
                return
            call.answer(zeros(self.probe.like(call.ask).answer))
            call.forward()

    def _key(self, call: Waiting) -> Any:
        """What calls have in common that can be merged."""
        ask = call.ask
        assert ask is not None
        if ask.key is None:
            ask.key = self._seen_key(call, ask) or self._new_key(call, ask)
        return ask.key

    def _seen_key(self, call: Waiting, ask: Ask) -> Any:
        """The key of the ask before, where this one's arguments are sure to have the same."""
        seen = call.seen.get(ask.form) if isinstance(call, Call) and call.autocast is None else None
        if seen is None or self.cache or self.diversity or ask.kind in self.probe.alone or not seen.fits(ask.tree):
            return None
        return seen.key

    def _new_key(self, call: Waiting, ask: Ask) -> Any:
        layout = self.probe.layout(ask)
        cached = isinstance(call, Call) and self.cache is not None and self.cache.covers(self, ask, call)
        alone = layout is None or ask.kind in self.probe.alone or self._keeps(ask)
        if cached and not alone and self.cache:
            alone = not self.cache.joined or (ask.form, layout.rows) not in self.probe.sure  # type: ignore[union-attr]
        if alone or layout is None:
            return *ask.kind, id(call)
        time = (call.step, call.passes) if self._pushed(call) else None  # type: ignore[union-attr]
        sure = (ask.form, layout.rows) in self.probe.sure
        key = (
            *ask.kind,
            time,
            getattr(call, "autocast", None),
            batching.key(ask.tree, layout, self._values) if sure else batching.shapes(ask.tree),
            (self.cache.key(call, ask), batching.shapes(ask.tree)) if cached and self.cache else None,  # type: ignore[arg-type]
        )
        plain = sure and not self.cache and not self.diversity and getattr(call, "autocast", None) is None
        if plain and isinstance(call, Call) and ((seen := call.seen.get(ask.form)) is None or seen.of_use):
            call.seen[ask.form] = Seen(ask.tree, layout, key)
        return key

    def _keeps(self, ask: Ask) -> bool:
        """Whether a denoiser answers with an object, such as a cache of keys, which is of one candidate alone."""
        if ask.method != "forward" or ask.model not in self.probe.denoisers:
            return False
        if ask.form not in self._keeping:
            self._keeping[ask.form] = more_than_numbers(self.probe.like(ask).answer)
            if self._keeping[ask.form]:
                name = type(self.pipe).__name__
                self.note(f"{name} runs one candidate at a time: its {ask.model} keeps what it needs later")
        return self._keeping[ask.form]

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
        self._denoised |= asks[0].method == "forward"
        hearing = self.hearing(calls)
        pushing: Any = nullcontext()
        if self.diversity and self._pushed(first):
            candidates = [call for call in calls if isinstance(call, Call)]
            pushing = self.diversity.pushing(self, candidates)
            asks += self.diversity.asks(self, candidates)
        hear = self.tap.listen([call.prompt for call in calls]) if self.tap and hearing else nullcontext()
        caching: Any = nullcontext()
        if self.cache and self.cache.covers(self, asks[0], first):
            caching = self.cache.running(self, [c for c in calls if isinstance(c, Call)], asks[0], layout.rows)
        with self._processors_of(first), pushing, self._autocast_of(first), caching, hear as heard:
            parts = self._parts_of(calls, asks, layout)
        if parts is None:  # they cannot be merged; each runs alone from now on
            for ask in asks:
                ask.key = None
            return
        self._hand_out(calls, parts[: len(calls)], hearing, heard[0] if heard else None)
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
        most, count = self.limits.of(self.kind(calls[0])), len(asks)
        filling = filled_size(count, max(most, count)) - count if asks[0].model in self.compiled else 0
        trees = batching.padded([ask.tree for ask in (*[asks[0]] * filling, *asks)], layout)  # who listens: last rows
        merged = asks[0].filled(batching.merge(trees, layout))
        answer = self._finite(self.work(merged), merged, calls, layout)
        return batching.split(answer, len(trees), layout)[filling:]

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


def filled_size(count: int, most: int) -> int:
    """The size to which a batch of a compiled model is filled up: 1, 2, 3, 4, 6, 8, 12, 16, 24, 32 ..., or the most."""
    power = 1 << (count - 1).bit_length()
    return min(power * 3 // 4 if count <= power * 3 // 4 else power, most)


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


__all__ = ["Drawing", "Runner", "Waiting", "filled_size"]
