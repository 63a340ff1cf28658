"""One call of a stock pipeline, suspended where it calls a model and after the steps of its scheduler.

The call runs in a greenlet of its own, on a shallow copy of the pipeline: the weights are shared; the scheduler, the
random state and whatever else the call sets on the pipeline are its own. Where the pipeline calls a model, the call
asks and waits (`Ask`), so that what many calls ask can be run as one batch. Every pipeline hands its latents to
`scheduler.step` once per denoiser call: there a call stands, until it is resumed.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import inspect
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from ttsnap.pipelines.batching import Seen, shapes
from ttsnap.pipelines.estimates import Level, Step
from ttsnap.pipelines.standing import Standing, own_state, own_tree

CONTEXT: contextvars.ContextVar[Any] = contextvars.ContextVar("CONTEXT", default=None)  # each call has its own
END = 1 << 30  # a target beyond all steps: to the end of the call


class Ask:
    """A model call that a suspended pipeline waits for.

    Attributes:
        model: name of the component.
        method: `forward` or `decode`.
        args: its arguments,
        kwargs: by position and by name,
        tree: and all of them.
        form: what its layout is known by: model, method and which arguments were given.
        key: equal for asks that can be merged; found out when it is wanted.
        context: what the pipeline says of the call to caches (`cache_context`), such as which pass of guidance it is.
    """

    __slots__ = ("args", "context", "form", "key", "kwargs", "method", "model", "tree")

    def __init__(self, model: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.method, self.args, self.kwargs = model, method, args, kwargs
        self.tree: dict[Any, Any] = {**dict(enumerate(args)), **kwargs} if args else kwargs
        self.form: Hashable = (model, method, len(args), *kwargs)
        self.key: Any = None
        self.context: Any = CONTEXT.get()

    @property
    def kind(self) -> tuple[str, str]:
        """Asks of other kinds are never one batch."""
        return self.model, self.method

    def filled(self, tree: Mapping[Hashable, Any]) -> Ask:
        """The same ask with other arguments."""
        args = tuple(tree[number] for number in range(len(self.args)))
        made = Ask(self.model, self.method, args, {name: tree[name] for name in self.kwargs})
        made.context = self.context
        return made


def ask(model: str, method: str, *args: Any, **kwargs: Any) -> Any:
    """Wait for a model's answer; runs in the greenlet of a call."""
    parent = getcurrent().parent
    assert parent is not None
    return parent.switch(Ask(model, method, args, kwargs))


class cache_context:
    """What a pipeline says of its next denoiser calls, kept for the call that says it; runs in its greenlet."""

    def __init__(self, name: str, **where: Any) -> None:
        self._said = _cache_context_type()(name, **where)

    def __enter__(self) -> None:
        self._token = CONTEXT.set(self._said)

    def __exit__(self, *_: object) -> None:
        CONTEXT.reset(self._token)


@functools.cache
def _cache_context_type() -> Any:
    from diffusers.hooks.hooks import CacheContext

    return CacheContext


def models(pipe: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def stand_ins(pipe: Any, names: Iterable[str]) -> dict[str, nn.Module]:
    """Shallow copies of models that ask where these would work; the models and their hooks stay as they are.

    Args:
        pipe: the pipeline.
        names: its models whose forward pass is asked for; of models with a `decode`, that is asked for in any case.
    """
    made: dict[str, nn.Module] = {}
    for name, model in models(pipe).items():
        own: dict[str, Any] = {}
        if name in names:
            own["forward"] = functools.partial(ask, name, "forward")
            own["forward"].__signature__ = inspect.signature(model.forward)  # some pipelines look at it
            if hasattr(model, "cache_context"):
                own["cache_context"] = cache_context
        if callable(getattr(model, "decode", None)):
            own["decode"] = functools.partial(ask, name, "decode")
        if own:
            made[name] = _stand_in(model, own)
    return made


def _stand_in(model: nn.Module, own: dict[str, Any]) -> nn.Module:
    """A shallow copy with other methods and without hooks; its modules need not be walked through."""
    hooks: dict[str, Any] = {
        name: OrderedDict() for name in vars(model) if name.startswith("_") and name.endswith("_hooks")
    }
    twin = copy.copy(model)
    # What would be the compiled call is what a module calls before it looks for hooks.
    vars(twin).update(hooks, _compiled_call_impl=own.get("forward"), **own)
    known = {
        name: getattr(model, name)
        for name in ("dtype", "device")
        if isinstance(getattr(type(model), name, None), property)
    }
    if known and not hasattr(model, "_orig_mod"):
        hooked = ("_diffusers_hook", "_hf_hook")  # which tell where inputs have to be
        if not any(hasattr(module, name) for module in model.modules() for name in hooked):
            known["modules"] = _itself  # who looks for hooks finds none
        twin.__class__ = _settled(cast(Any, type(model)), tuple(known.items()))
    return twin


def _itself(model: nn.Module, remove_duplicate: bool = True) -> Iterator[nn.Module]:
    yield model


@functools.lru_cache(maxsize=256)
def _settled(kind: Any, known: tuple[tuple[str, Any], ...]) -> type:
    """A class that is the same but for what is known already."""
    return type(kind.__name__, (kind,), {**dict(known), "__module__": kind.__module__, "__doc__": kind.__doc__})


# The scheduler of a call.


@dataclass(eq=False)
class Progress:
    """How far a call has come; shared by the call, which reads it, and its scheduler, which writes it.

    Attributes:
        step: steps made.
        target: the step after which the call stands.
        last: that step.
        begin: of a call that takes up another's work, where this stands; the steps before are not made.
        main: the `id` of the pipeline's scheduler whose steps count; None: those of all.
        copies: steps of copies that the pipeline makes of its scheduler count, the first after each model call.
        unseen: steps of such copies that did not count.
        fresh: whether a model was called since the last step.
        levels: noise levels of the steps, if they are known.
        generator: of the call,
        devices: and where it draws otherwise, beside the CPU.
    """

    step: int = 0
    target: int = 0
    last: Step | None = None
    begin: Standing | None = None
    main: int | None = None
    copies: bool = False
    unseen: int = 0
    fresh: bool = False
    levels: list[Level] | None = None
    generator: torch.Generator | None = None
    devices: tuple[torch.device, ...] = ()

    @property
    def paid(self) -> int:
        """Steps that were made here, and not by another call."""
        return max(0, self.step - (self.begin.step if self.begin else 0))

    @property
    def skipping(self) -> bool:
        """Whether the models need not work, as the outcome is not used."""
        return self.begin is not None and self.step < self.begin.step

    def made(self, scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step of the scheduler; stands there if this is the target."""
        if self.main is not None and watch_of(scheduler).origin != self.main:
            return step(scheduler, *args, **kwargs)
        if self.skipping:
            return self._skipped(scheduler, step, args, kwargs)
        result = step(scheduler, *args, **kwargs)
        self.step += 1
        if self.step < self.target:
            return result
        given = (args[p] if p < len(args) else kwargs[n] for n, p in _places(type(scheduler)))  # type: ignore[arg-type]
        output, time, sample = given
        level = self.levels[self.step - 1] if self.levels and self.step <= len(self.levels) else None
        self.last = Step(scheduler, output, time, sample, result, level)
        return self._stand()

    def made_by_copy(
        self, scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A step of a copy of the scheduler, of which a pipeline may make one for each frame."""
        if not self.copies or not self.fresh:
            self.unseen += 1
            return step(scheduler, *args, **kwargs)
        self.fresh = False
        return self.made(scheduler, step, args, kwargs)

    def _skipped(self, scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step that another call has made: only the scheduler's counters matter, until it stands where that did."""
        begin = self.begin
        assert begin is not None
        result = step(scheduler, *args, **kwargs)
        self.step += 1
        if self.step < begin.step:
            return result
        if begin.scheduler is None:
            forget(scheduler)
        else:
            vars(scheduler).update(own_state(begin.scheduler))
        if begin.generator is not None and self.generator is not None:
            self.generator.set_state(begin.generator)
        if begin.random is not None:
            torch.set_rng_state(begin.random[0])
            for device, state in zip(self.devices, begin.random[1:], strict=False):
                torch.cuda.set_rng_state(state, device)
        self.last = Step(scheduler, None, None, None, begin.put(result), None)  # type: ignore[arg-type]
        return self._stand()

    def _stand(self) -> Any:
        if self.step >= self.target:
            parent = getcurrent().parent
            assert parent is not None
            parent.switch(None)
        assert self.last is not None
        result = self.last.result
        self.last = None
        return result


def forget(scheduler: Any) -> None:
    """Let a multistep solver begin anew where it stands: what it remembers are steps that were not made."""
    state = vars(scheduler)
    if "model_outputs" in state:
        state["model_outputs"] = [None] * len(state["model_outputs"])
        state |= {name: value for name, value in (("lower_order_nums", 0), ("last_sample", None)) if name in state}
    for name in ("derivatives", "ets"):
        if name in state:
            state[name] = []


class Watch:
    """A method of one call's scheduler that tells what it does; copies that a pipeline makes tell of themselves.

    Args:
        scheduler: the call's own,
        name: and its method, `step` or `set_timesteps`.
        origin: `id` of the pipeline's scheduler that this is a copy of.
        progress: is told.
        schedules: what `set_timesteps` came to, kept for the next call.
    """

    def __init__(self, scheduler: Any, name: str, origin: int, progress: Progress, schedules: dict[Any, Any]) -> None:
        self.name, self.origin, self.progress, self.schedules = name, origin, progress, schedules
        self.copied, self.fresh = False, True
        self._scheduler = weakref.ref(scheduler)
        self._method = getattr(type(scheduler), name)
        self.__signature__ = _signature(type(scheduler), name)  # type: ignore[arg-type]  # pipelines look at it

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        twin = copy.copy(self)
        twin.copied = True
        twin._scheduler = weakref.ref(memo.get(id(self._scheduler()), self._scheduler()))
        return twin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method."""
        scheduler = self._scheduler()
        if self.name == "set_timesteps":
            return self._schedule(scheduler, args, kwargs)
        told = self.progress.made_by_copy if self.copied else self.progress.made
        return told(scheduler, self._method, args, kwargs)

    def _schedule(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A schedule is worked out once: candidates share its tensors, so that equal timesteps are the same memory."""
        asked = _hashable((args, kwargs)) if self.fresh and not self.copied else None
        self.fresh = False
        if asked is None:
            return self._method(scheduler, *args, **kwargs)
        state, key = vars(scheduler), (self.origin, asked)
        if (found := self.schedules.get(key)) and found[1] == _versions(found[0]):
            state.update(own_state(found[0]))
            return None
        answer = self._method(scheduler, *args, **kwargs)
        if answer is None:
            kept = own_state({name: value for name, value in state.items() if not isinstance(value, Watch)})
            self.schedules[key] = kept, _versions(kept)
        return answer


@functools.cache
def _signature(kind: Any, name: str) -> inspect.Signature:
    """Of a method of an object."""
    whole = inspect.signature(getattr(kind, name))
    return whole.replace(parameters=list(whole.parameters.values())[1:])


@functools.cache
def _places(kind: Any) -> tuple[tuple[str, int], ...]:
    """Names and places of what a scheduler's step is given: the denoiser's answer, the time, the latents."""
    places = {name: place for place, name in enumerate(_signature(kind, "step").parameters)}
    return tuple((name, places[name]) for name in ("model_output", "timestep", "sample"))


def _versions(state: Mapping[str, Any]) -> list[int]:
    return [value._version for value in state.values() if isinstance(value, Tensor)]


def _hashable(tree: Any) -> Hashable:
    """Arguments as a key; None where they are none."""
    if isinstance(tree, list | tuple):
        items = tuple(_hashable(item) for item in tree)
        return None if any(item is None for item in items) else (type(tree), items)
    if isinstance(tree, dict):
        return _hashable([(name, item) for name, item in tree.items()])
    if tree is None:
        return "None"
    if isinstance(tree, np.ndarray):
        return tree.dtype.str, tree.shape, tree.tobytes()
    if isinstance(tree, str | int | float | bool | torch.device | torch.dtype):
        return type(tree), tree
    return None


def own_scheduler(scheduler: Any, progress: Progress, schedules: dict[Any, Any]) -> Any:
    """A copy of a scheduler for one call, which tells of its steps."""
    twin = copy.copy(scheduler)
    state = vars(twin)
    state.update(own_state(vars(scheduler)))
    for name in ("step", "set_timesteps"):
        if name not in vars(scheduler):
            state[name] = Watch(twin, name, id(scheduler), progress, schedules)
    return twin


def watch_of(scheduler: Any) -> Watch:
    """What tells of the steps of a call's scheduler."""
    return vars(scheduler)["step"]  # type: ignore[no-any-return]


def state_of(scheduler: Any) -> dict[str, Any]:
    """What a scheduler knows, apart from its configuration and who is told of it."""
    known = {name: v for name, v in vars(scheduler).items() if not isinstance(v, Watch) and name != "_internal_dict"}
    return own_state(known)  # type: ignore[no-any-return]


def inner_pipelines(pipe: Any) -> dict[str, Any]:
    """Pipelines that a pipeline is made of, by the name of the attribute that holds them."""
    from diffusers import DiffusionPipeline

    return {name: value for name, value in vars(pipe).items() if isinstance(value, DiffusionPipeline)}


def own_copy(
    pipe: Any,
    progress: Progress,
    parts: Mapping[int, Any],
    schedules: dict[Hashable, Any],
    dress: Callable[[Any], None],
    device: torch.device,
) -> Any:
    """A shallow copy of a pipeline for one call: shared weights, schedulers of its own, which tell of their steps.

    Args:
        pipe: the stock pipeline, which stays as it is.
        progress: what the schedulers tell.
        parts: what takes the place of a component, by its `id`.
        schedules: what `set_timesteps` came to, kept for the next call.
        dress: sets what else the copy needs.
        device: where the pipeline runs; finding out takes longer than the rest.
    """
    parts = dict(parts)

    def copied(one: Any) -> Any:
        own = copy.copy(one)
        if not is_modular(one):
            # The pipeline's own __setattr__ would write what a call sets into the configuration, which calls share.
            settled = (("_execution_device", device), ("__setattr__", object.__setattr__))
            own.__class__ = _settled(cast(Any, type(one)), settled)
        state = vars(own)
        for name, value in state.items():
            if id(value) in parts:
                state[name] = parts[id(value)]
            elif hasattr(value, "set_timesteps") and hasattr(value, "step"):
                state[name] = parts[id(value)] = own_scheduler(value, progress, schedules)
            elif hasattr(value, "set_state") and hasattr(value, "prepare_inputs"):  # a guider knows the step it is at
                state[name] = parts[id(value)] = copy.deepcopy(value)
        for name, value in inner_pipelines(one).items():
            state[name] = copied(value)
        # Into the dictionary, as modular pipelines have a __setattr__ of their own, too.
        # Models stay where they are between calls; that they be freed after each would only move them to and fro.
        state.update(_progress_bar_config={"disable": True}, maybe_free_model_hooks=_nothing)
        dress(own)
        return own

    return copied(pipe)


def _nothing() -> None:
    return None


def own_containers(tree: Any, leaf: Callable[[Any], Any] = lambda value: value) -> Any:
    """The same with lists, tuples and dictionaries of its own, and what `leaf` makes of other values."""
    if type(tree) is dict:
        return {name: own_containers(item, leaf) for name, item in tree.items()}
    return type(tree)(own_containers(item, leaf) for item in tree) if type(tree) in (list, tuple) else leaf(tree)


def own_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments for one call: containers and numbers of its own; objects and pictures are shared."""

    def own(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return value.copy() if isinstance(value, np.ndarray) else value

    return own_containers(arguments, own)  # type: ignore[no-any-return]


# What a call has come to, and a call itself.


@contextmanager
def random_kept(device: torch.device) -> Iterator[None]:
    """Whatever draws inside, torch's own generators are in the end as they were."""
    before = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


class Call:
    """One candidate's call of the pipeline.

    It belongs to the thread that began it and goes forward only; `Standing` takes a candidate out of it. When it is no
    longer referred to, it ends where it waits and frees its memory.

    Args:
        work: makes the call.
        prompt: of the candidate.
        seed: its seed.
        progress: what its schedulers tell.
        generator: that the pipeline draws from.
        device: where it draws otherwise.

    Attributes:
        ask: the model call it waits for.
        output: what the pipeline returned, once it has.
        error: what went wrong.
        processors: attention processors that the call has put into the models, by model.
        cells: what a `Tap` heard of a denoiser call, [1, cells, channels],
        heard: and how many steps had been made then.
        passes: denoiser calls answered since the last step.
        random: state of torch's own generators as the call has them, the CPU's first.
        autocast: dtype of the autocast it waits in, if any.
        seen: what it asked for last whose key is known, by its form.
        kept: what a cache keeps of it, by the name of the denoiser,
        saved: and TFLOP that it did without.
        whole: it takes no cache, though others do.
        again: calls that it makes though they were made before.
        pipe: finds the call's own copy of the pipeline.
    """

    def __init__(
        self,
        work: Callable[[], Any],
        prompt: str,
        seed: int,
        progress: Progress,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.prompt, self.seed, self.progress, self.generator = prompt, seed, progress, generator
        self.ask: Ask | None = None
        self.output: Any = None
        self.error: Exception | None = None
        self.processors: dict[str, Any] = {}
        self.cells: Tensor | None = None
        self.heard = -1
        self.passes, self._counted = 0, 0
        self._answer: Any = None
        self._device = device
        self._cuda = device.type == "cuda"
        progress.generator, progress.devices = generator, (device,) if self._cuda else ()
        self.random: tuple[Tensor, ...] = (torch.Generator().manual_seed(seed).get_state(),)
        if self._cuda:
            self.random += (torch.Generator(device).manual_seed(seed).get_state(),)
        self.autocast: Any = None
        self.seen: dict[Hashable, Seen] = {}
        self.kept: dict[str, Any] = own_tree(progress.begin.kept) if progress.begin else {}
        self.saved, self.whole, self.again = 0.0, False, 0
        self.pipe: Callable[[], Any] = _nothing
        self._thread = threading.get_ident()
        # The greenlet must not lead back to this object: it would then never be freed.
        self._greenlet: greenlet = greenlet(work)
        self._greenlet.gr_context = contextvars.copy_context()

    @property
    def step(self) -> int:
        """Steps made."""
        return self.progress.step

    @property
    def timestep(self) -> Any:
        """The model time of the step that the pipeline is at, as it tells it."""
        return getattr(self.pipe(), "current_timestep", None)

    @property
    def done(self) -> bool:
        """Whether the call has returned or failed."""
        return bool(self._greenlet.dead)

    @property
    def here(self) -> bool:
        """Whether the call can be resumed: it has not ended, and belongs to this thread."""
        return not self._greenlet.dead and self._thread == threading.get_ident()

    @property
    def arrived(self) -> bool:
        """Whether it stands at its target, or has ended."""
        return self.done or self.error is not None or (self.ask is None and self.step >= self.progress.target)

    def answer(self, value: Any) -> None:
        """What the model that it waits for answered."""
        self.ask, self._answer = None, value

    def forward(self) -> None:
        """Run until it asks for a model, stands at its target, or ends; errors are kept in `error`.

        Gradients must be off: a pipeline switches them off for its call, and back to what they were when it ends.
        """
        if self.ask is not None or self.arrived:
            return
        try:
            event = self.within(self._switch)
        except Exception as error:
            self.error = error
            return
        if self._greenlet.dead:
            self.output = event
        elif event is not None:
            self.ask = event
            if self._counted != self.progress.step:
                self.passes, self._counted = 0, self.progress.step
            self.progress.fresh = True

    def _switch(self) -> Any:
        self._greenlet.parent = getcurrent()
        if not self._greenlet:
            return self._greenlet.switch()
        answer, self._answer = self._answer, None
        return self._greenlet.switch(answer)

    def within(self, work: Callable[[], Any]) -> Any:
        """Do something with the random state and autocast of this call; `random_kept` puts back those of the thread."""
        assert not torch.is_grad_enabled()
        torch.set_rng_state(self.random[0])
        if self._cuda:
            torch.cuda.set_rng_state(self.random[1], self._device)
        if self.autocast is not None:
            torch.set_autocast_enabled(self._device.type, True)
            torch.set_autocast_dtype(self._device.type, self.autocast)
        try:
            return work()
        finally:
            self.autocast = None
            if torch.is_autocast_enabled(self._device.type):
                self.autocast = torch.get_autocast_dtype(self._device.type)
                torch.set_autocast_enabled(self._device.type, False)
            state = torch.get_rng_state()
            self.random = (state, torch.cuda.get_rng_state(self._device)) if self._cuda else (state,)

    def count_pass(self) -> None:
        """One more denoiser call of the present step is made."""
        self.passes += 1

    def standing(self) -> Standing:
        """The candidate outside its call, where this stands."""
        last = self.progress.last
        assert last is not None
        result = last.result if isinstance(last.result, tuple) else dict(last.result)
        state = state_of(last.scheduler)
        random = self.generator.get_state(), self.random
        return Standing(self.prompt, self.seed, self.step, result, state, *random, kept=own_tree(self.kept))

    def close(self) -> None:
        """End the call where it waits."""
        if self._greenlet and self._thread == threading.get_ident():  # true where it has begun and not ended
            grad = torch.is_grad_enabled()
            try:
                self._greenlet.parent = getcurrent()
            except ValueError:  # its thread has ended, and this one has got its number
                return
            self._greenlet.throw()  # GreenletExit
            self.progress.last = None
            torch.set_grad_enabled(grad)

    def __del__(self) -> None:
        if hasattr(self, "_greenlet") and not sys.is_finalizing():
            self.close()


# What calls need not do twice.


@dataclass(eq=False)
class Memo:
    """Remembers what a method answered to the same arguments, such as the encoding of a prompt.

    Attributes:
        limit: most answers kept; the oldest are forgotten first.
        before: is called before the method is.
        count: tells the TFLOP so far, where they are counted.
        tflop: what the method took.
    """

    limit: int = 256
    before: Callable[[], None] = _nothing
    count: Callable[[], float] | None = None
    tflop: float = 0.0
    asking: bool = False
    _known: OrderedDict[Hashable, list[tuple[Any, Any, list[int]]]] = field(default_factory=OrderedDict, repr=False)

    def wrap(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, asked only about what is new; the containers of an answer are each caller's own."""

        @functools.wraps(method)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            key = shapes((args, kwargs))
            for asked, answer, versions in self._known.get(key, ()):
                if same(asked, (args, kwargs)) and [t._version for t in tensors(answer)] == versions:
                    return own_containers(answer)
            asked = own_containers((args, kwargs))  # as it was, should the method change it
            self.before()
            start = self.count() if self.count else 0.0
            self.asking = True
            try:
                answer = method(*args, **kwargs)
            finally:
                self.asking = False
            self.tflop += self.count() - start if self.count else 0.0
            entries = self._known.setdefault(key, [])
            entries[:] = [entry for entry in entries if not same(entry[0], asked)]
            entries.append((asked, answer, [t._version for t in tensors(answer)]))
            self._known.move_to_end(key)
            if len(self._known) > self.limit:
                self._known.popitem(last=False)
            return own_containers(answer)

        return remembered

    def forget(self) -> None:
        """Forget all answers."""
        self._known.clear()


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in a tree."""
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for item in items for tensor in tensors(item)]


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal to the last bit; tensors, arrays and pictures are compared by their content."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if hasattr(a, "tobytes") and hasattr(a, "size"):  # a picture
        return bool(a.size == b.size and a.mode == b.mode and a.tobytes() == b.tobytes())
    return bool(isinstance(a, str | int | float | bool | torch.device | torch.dtype) and a == b)


def method_of(own: Any, name: str) -> Callable[..., Any]:
    """A method of a pipeline that does not keep it alive: the pipeline will refer to it."""
    if name in vars(own):  # set on the object itself
        return vars(own)[name]  # type: ignore[no-any-return]
    reference, method = weakref.ref(own), getattr(type(own), name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(reference(), *args, **kwargs)

    return call


def is_modular(pipe: Any) -> bool:
    """Whether a pipeline is made of blocks (`ModularPipeline`)."""
    from diffusers import ModularPipeline

    return isinstance(pipe, ModularPipeline)


def quieten(blocks: Any) -> None:
    """No progress bars: blocks draw them, and calls share these."""
    for block in getattr(blocks, "sub_blocks", {}).values():
        if hasattr(block, "progress_bar"):
            block.set_progress_bar_config(disable=True)
        quieten(block)


def taken_by(pipe: Any) -> list[str]:
    """Names of the arguments of a pipeline's call."""
    if is_modular(pipe):
        return [parameter.name for parameter in pipe.blocks.inputs if parameter.name]
    return list(inspect.signature(type(pipe).__call__).parameters) if callable(pipe) else []


def call_of(own: Any, given: dict[str, Any]) -> Callable[[], Any]:
    """The call of a pipeline with its arguments, which returns images first."""
    if is_modular(own):
        return lambda: (own(output="images", **given),)
    return functools.partial(own, **given)
