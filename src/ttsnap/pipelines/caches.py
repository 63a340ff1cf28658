"""Caches of diffusers that let denoiser calls do without a part of their work, with a state for each candidate.

diffusers keeps what a cache reuses in hooks on the denoiser, one state for the call that runs. Candidates are calls
that run in turns; so each has a state of its own, which is put into the hooks while its call is answered. Caches that
decide by the step alone are answered in batches, whose states are joined and split as the arguments are; those that
decide by what the denoiser sees (FirstBlock, Sea), or split their batch (Faster), one by one: in a batch one candidate
would decide for another.

What a candidate's calls did not compute is counted in TFLOP, block by block, and not charged. As drafts, only
candidates on their way to a look use the cache: those that are finished are begun again with whole calls, so that the
picture is the stock call's.
"""

from __future__ import annotations

import copy
import difflib
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ttsnap.core.values import read_options
from ttsnap.pipelines.batching import join, split
from ttsnap.pipelines.counting import count_tflop
from ttsnap.pipelines.single_file import first_line
from ttsnap.pipelines.standing import own_tree

if TYPE_CHECKING:
    from ttsnap.pipelines.call import Ask, Call
    from ttsnap.pipelines.sampler import Sampler

CACHES = {  # by the names that people give them; those that can be joined are decided by the step alone
    "FirstBlock": "FirstBlockCacheConfig",
    "TaylorSeer": "TaylorSeerCacheConfig",
    "Faster": "FasterCacheConfig",
    "Mag": "MagCacheConfig",
    "PAB": "PyramidAttentionBroadcastConfig",
    "Sea": "SeaCacheConfig",
}
JOINED = ("TaylorSeer", "Mag", "PAB")
CONTEXTS = ("FirstBlock", "TaylorSeer", "Sea")  # need a pipeline that says which of its passes a call is
DENOISERS = ("transformer", "transformer_2", "unet")
EXAMPLE = "--cache FirstBlock,threshold=.1"
Place = tuple[str, str, str]  # module, hook and attribute where a state is kept


def read_cache(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a cache such as `FirstBlock,threshold=.1`.

    Raises:
        ValueError: there is no such cache, or it takes no such option.
    """
    import diffusers
    import torch

    name, _, rest = text.partition(",")
    plain = name.strip().lower().removesuffix("config").removesuffix("cache")
    named = {known.lower(): known for known in CACHES} | {"pyramidattentionbroadcast": "PAB"}
    if plain not in named:
        raise ValueError(f"unknown cache {name!r}; known are {', '.join(CACHES)}")
    kind, options = named[plain], read_options(rest, EXAMPLE)
    known = [one.name for one in fields(getattr(diffusers, CACHES[kind])) if "callback" not in one.name]
    for option, value in options.items():
        if option not in known:
            close = difflib.get_close_matches(option, known, 1)
            meant = f"; did you mean {close[0]}?" if close else f"; it takes {', '.join(known)}"
            raise ValueError(f"the cache {kind} takes no option {option!r}{meant}")
        if option.endswith("identifiers"):
            options[option] = str(value).split(";")
        elif isinstance(value, str) and ";" in value:  # a list, as commas part the options
            options[option] = list(read_numbers(value, option))
        elif option.endswith("dtype"):
            options[option] = getattr(torch, str(value), value)
    if kind == "Mag" and "mag_ratios" not in options and not options.get("calibrate"):
        raise ValueError(
            "the cache Mag needs mag_ratios, measured on the model: flux for FLUX.1, or numbers such as 1;.99;.98"
        )
    return kind, options


def read_numbers(text: str, option: str) -> Iterator[float]:
    """Numbers that are parted by semicolons."""
    for part in text.split(";"):
        try:
            yield float(part)
        except ValueError:
            raise ValueError(f"{option} takes numbers such as 1;.99;.98, got {part!r}") from None


@dataclass(eq=False)
class Cache:
    """A cache of a pipeline's denoisers, and what it keeps of each candidate.

    Attributes:
        kind: its name, of `CACHES`.
        options: of its configuration.
        text: the name and options as they were asked for.
        drafts: only candidates on their way to a look use it; those that are finished are begun again without.
        asked: blocks (or attentions) that the cache watches, summed over the calls of all candidates,
        computed: and those of them that were really computed.
        tflop: of each of them for one candidate, by model and place; counted when they are first computed.
        shares: what each call of one candidate computed of a whole one [num_steps].
    """

    kind: str
    options: dict[str, Any]
    text: str = ""
    drafts: bool = False
    asked: int = 0
    computed: int = 0
    tflop: dict[tuple[str, str], float] = field(default_factory=dict)
    shares: tuple[float, ...] = ()
    _calls: Sequence[Call] = ()
    _saved: float = 0.0
    _inside: bool = False

    @property
    def joined(self) -> bool:
        """Whether several candidates are answered in one batch."""
        plain = not (self.options.get("use_lite_mode") or self.options.get("skip_predict_identifiers"))
        return self.kind in JOINED and plain

    def config(self, timestep: Callable[[], Any]) -> Any:
        """The configuration that diffusers takes.

        Args:
            timestep: the model time of the call that runs, for caches that ask for it.
        """
        import diffusers

        options = dict(self.options)
        if options.get("mag_ratios") == "flux":
            from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

            options["mag_ratios"] = FLUX_MAG_RATIOS
        if self.kind in ("PAB", "Faster"):
            options["current_timestep_callback"] = timestep
        return getattr(diffusers, CACHES[self.kind])(**options)

    @property
    def written(self) -> str:
        """The configuration in Python."""
        options = {name: repr(value) for name, value in self.options.items()}
        if self.options.get("mag_ratios") == "flux":
            options["mag_ratios"] = "diffusers.hooks.mag_cache.FLUX_MAG_RATIOS"
        if self.kind in ("PAB", "Faster"):
            options["current_timestep_callback"] = "lambda: pipe.current_timestep"
        return f"diffusers.{CACHES[self.kind]}({', '.join(f'{name}={value}' for name, value in options.items())})"

    @property
    def said(self) -> str:
        """What a result says of it."""
        share = f"{self.computed / self.asked:.0%} of the blocks that it watches were computed" if self.asked else ""
        whose = "of drafts, " if self.drafts else ""
        return f"cache {self.kind}: {whose}{share}; the TFLOP leave out what was not" if share else ""

    def covers(self, sampler: Any, ask: Ask, call: Any = None) -> bool:
        """Whether the cache is at work in what is asked for, by a candidate's call."""
        if getattr(call, "whole", False):
            return False
        return ask.method == "forward" and ask.model in DENOISERS and ask.model in sampler.probe.loop

    def key(self, call: Call, ask: Ask) -> Hashable:
        """What candidates have in common that can be answered together: all of their states but for the tensors."""
        return ask.context, _outline(call.kept.get(ask.model))

    @contextmanager
    def running(self, sampler: Any, calls: Sequence[Call], ask: Ask, rows: int) -> Iterator[None]:
        """Inside, the denoiser works with the cache, and goes on from the states of these candidates.

        Args:
            sampler: the pipeline's.
            calls: of the candidates.
            ask: what one of them asks for.
            rows: of one candidate's ask.
        """
        model = sampler.component(ask.model)
        self._calls, self._saved = calls, 0.0
        with self._enabled(model, ask.model) as places:
            fresh = {place: getattr(hook, place[2]) for place, hook in places.items()}
            states = [call.kept.get(ask.model) or fresh for call in calls]
            state = own_tree(states[0]) if len(states) == 1 else _joined(states, rows)
            for place, hook in places.items():
                setattr(hook, place[2], state[place])
            with model.cache_context(**vars(ask.context)) if ask.context else nullcontext():
                yield
            parts = [state] if len(calls) == 1 else _split(state, len(calls), rows)
            for call, part in zip(calls, parts, strict=True):
                call.kept[ask.model] = part
                call.saved += max(0.0, self._saved)

    @contextmanager
    def _enabled(self, model: Any, name: str = "") -> Iterator[dict[Place, Any]]:
        """The hooks that keep a state, by their places; afterwards the model is as it was."""
        model.enable_cache(self.config(lambda: self._calls[0].timestep))
        references = []
        try:
            places = dict(_hooks(model))
            for hook, place in {id(hook): (hook, place) for place, hook in places.items()}.values():
                work, which = hook.fn_ref.original_forward, (name, place[0])
                references.append((hook.fn_ref, work))
                counted = functools.partial(self._counted, work, which)
                hook.fn_ref.original_forward = functools.update_wrapper(counted, work)
                self._saved += self.tflop.get(which, 0.0)
            self.asked += len(references) * len(self._calls)
            yield places
        finally:
            for reference, work in references:
                reference.original_forward = work
            model.disable_cache()

    def _counted(self, work: Callable[..., Any], which: tuple[str, str], *args: Any, **kwargs: Any) -> Any:
        """What a watched block computes; the first time it is counted what that takes."""
        self.computed += len(self._calls)
        if which in self.tflop or len(self._calls) != 1:
            self._saved -= self.tflop.get(which, 0.0)
            return work(*args, **kwargs)
        made: list[Any] = []
        self.tflop[which] = 0.0
        self.tflop[which] = count_tflop(lambda: made.append(work(*args, **kwargs)))
        return made[0]


def attach(sampler: Sampler, text: str, drafts: bool = False) -> None:
    """Let the denoisers of a sampler work with a cache.

    Args:
        sampler: the pipeline's.
        text: name and options of the cache.
        drafts: only for candidates on their way to a look.

    Raises:
        ValueError: there is no such cache, or it does not fit the pipeline.
    """
    kind, options = read_cache(text)
    name = type(sampler.pipe).__name__
    if kind == "Mag":
        options.setdefault("num_inference_steps", sampler.num_steps)
    cache = Cache(kind, options, text, drafts)
    asks = [f.ask for f in sampler.probe.forwards if cache.covers(sampler, f.ask)]
    models = {ask.model: sampler.component(ask.model) for ask in asks}
    if not models or not all(hasattr(model, "enable_cache") for model in models.values()):
        raise ValueError(f"the denoiser of {name} takes no cache in diffusers; leave it out")
    if kind in CONTEXTS and any(ask.context is None for ask in asks):
        raise ValueError(f"{name} does not say which pass a call is, as the cache {kind} needs; take PAB or Mag")
    if kind in ("PAB", "Faster") and not hasattr(type(sampler.pipe), "current_timestep"):
        raise ValueError(f"{name} does not tell the time of a step, as the cache {kind} needs; take another")
    if (
        kind == "Faster"
        and not options.get("is_guidance_distilled")
        and any(f.rows < 2 for f in sampler.probe.forwards if f.ask in asks)
    ):
        raise ValueError(
            f"{name} makes no batch of two for guidance, which Faster skips half of; add is_guidance_distilled=true"
        )
    for model in models.values():
        try:
            with cache._enabled(model) as places:
                fits = bool(places)
        except Exception as error:
            raise ValueError(f"the cache {kind} does not fit {name}: {error}") from error
        if not fits:
            raise ValueError(f"the cache {kind} finds nothing to keep in the denoiser of {name}; take another")
    if cache.joined:  # which arguments are rows has to be sure by then
        count = min(2, sampler.max_batch)
        sampler.advance(sampler.start([sampler.some_prompt] * count, list(range(count))), 1)
    else:
        sampler.note(f"the cache {kind} runs one candidate at a time, as each decides by itself what it computes")
    sampler.cache = cache
    try:  # one candidate to its end tells what each call takes
        made, saved = sampler.start([sampler.some_prompt], [0]), [0.0]
        for step in range(1, sampler.num_steps + 1):
            made = sampler.advance(made, step)
            saved += [call.saved for call in made.calls if call]
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the cache {kind} does not fit {name} in diffusers: {first_line(error.__cause__ or error)}"
        ) from error
    sampler.forget_prompts()
    cache.asked = cache.computed = 0
    whole = sampler.probe.step_tflop
    cache.shares = tuple(1 - (after - before) / whole for before, after in itertools.pairwise(saved))
    lines = [] if drafts else [f"pipe.{model}.enable_cache({cache.written})" for model in models]
    sampler.prelude = "; ".join(filter(None, [sampler.prelude, *lines]))


def _hooks(model: Any) -> Iterator[tuple[Place, Any]]:
    """The hooks of a cache by their places."""
    for name, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        for title, hook in registry.hooks.items() if registry else ():
            for attribute in ("state_manager", "state"):
                if hasattr(hook, attribute):
                    yield (name, title, attribute), hook


# States as trees: their tensors have rows like arguments.


def _outline(tree: Any) -> Hashable:
    """A state without what its tensors hold."""
    if isinstance(tree, Tensor):
        return (tree.dtype, tree.shape) if tree.ndim else tree.item()
    if isinstance(tree, Mapping):
        return tuple((name, _outline(item)) for name, item in tree.items())
    if isinstance(tree, list | tuple):
        return tuple(map(_outline, tree))
    if hasattr(tree, "__dict__") and not callable(tree):
        return _outline(vars(tree))
    return tree if isinstance(tree, Hashable) else id(tree)


def _joined(states: Sequence[Any], rows: int, known: dict[int, Any] | None = None) -> Any:
    """States of several candidates, alike but for their tensors, as that of a batch."""
    known = {} if known is None else known
    first = states[0]
    if id(first) in known:
        return known[id(first)]
    if isinstance(first, Tensor):
        return join(states, rows) if first.ndim else first
    if isinstance(first, dict):
        return {name: _joined([state[name] for state in states], rows, known) for name in first}
    if isinstance(first, list | tuple) and not isinstance(first, _plain_sizes()):
        return type(first)(_joined(items, rows, known) for items in zip(*states, strict=True))
    if not _is_state(first):
        return first
    made = known[id(first)] = copy.copy(first)
    vars(made).update(_joined([vars(state) for state in states], rows, known))
    return made


def _split(state: Any, count: int, rows: int, known: dict[int, list[Any]] | None = None) -> list[Any]:
    """The state of a batch as those of its candidates."""
    from ttsnap.pipelines.batching import Layout

    known = {} if known is None else known
    if id(state) in known:
        return known[id(state)]
    if isinstance(state, Tensor):
        return split(state, count, Layout(rows, {})) if state.ndim else [state] * count
    if isinstance(state, dict):
        columns = {name: _split(item, count, rows, known) for name, item in state.items()}
        return [{name: column[number] for name, column in columns.items()} for number in range(count)]
    if isinstance(state, list | tuple) and not isinstance(state, _plain_sizes()):
        items = [_split(item, count, rows, known) for item in state]
        return [type(state)(item[number] for item in items) for number in range(count)]
    if not _is_state(state):
        return [state] * count
    made = known[id(state)] = [copy.copy(state) for _ in range(count)]
    for one, own in zip(made, _split(vars(state), count, rows, known), strict=True):
        vars(one).update(own)
    return made


def _plain_sizes() -> type:
    import torch

    return torch.Size


def _is_state(value: Any) -> bool:
    """Whether an object is one in which diffusers' hooks keep what they know."""
    return (
        type(value).__module__.startswith("diffusers.hooks")
        and not isinstance(value, type)
        and hasattr(value, "__dict__")
        and "Context" not in type(value).__name__
    )


__all__ = ["CACHES", "Cache", "attach", "read_cache"]
