"""One call of a stock pipeline, suspended inside its scheduler's step and resumed or dropped later.

The call runs in a greenlet of its own, on a shallow copy of the pipeline: the models are shared, the scheduler and
whatever else the call sets on the pipeline are its own. Every pipeline hands its latents to `scheduler.step` once per
denoiser call, so that the step is where calls wait, with or without `callback_on_step_end`.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ttsnap.samplers.estimates import Step

if TYPE_CHECKING:
    from greenlet import greenlet

OnStep = Callable[[Step], Any]
"""Is told each step; what it returns is what the pipeline gets from the step."""


class Watch:
    """Tells of the steps of one scheduler, but not of copies that a pipeline makes of it."""

    def __init__(self, scheduler: Any, on_step: OnStep) -> None:
        self.scheduler = weakref.ref(scheduler)
        self.on_step = on_step

    def __deepcopy__(self, memo: Any) -> Watch:
        return self


@functools.cache
def _watched(kind: type) -> type:
    """A scheduler class that tells its `_watch` of every step, and is the same in all else."""
    step = kind.step  # type: ignore[attr-defined]
    signature = inspect.signature(step)

    @functools.wraps(step)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        watch = vars(self).get("_watch")
        if watch is None or watch.scheduler() is not self:
            return result
        given = signature.bind(self, *args, **kwargs).arguments
        return watch.on_step(Step(self, given["model_output"], given["timestep"], given["sample"], result))

    return type(kind.__name__, (kind,), {"step": watched, "__module__": kind.__module__, "__doc__": kind.__doc__})


def own_copy(pipe: Any, on_step: OnStep, parts: Mapping[str, Any] | None = None) -> Any:
    """A shallow copy of a pipeline for one call: shared models, its own scheduler, which tells of its steps.

    Args:
        pipe: the stock pipeline, which stays as it is.
        on_step: is told each step.
        parts: attributes to set on the copy.
    """
    own = copy.copy(pipe)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.__class__ = _watched(type(scheduler))  # type: ignore[arg-type]
    scheduler._watch = Watch(scheduler, on_step)
    # Straight into the dictionary: the pipeline's own __setattr__ would write the new parts into its configuration.
    # Models stay where they are between calls; that they be freed after each would only move them to and fro.
    quiet = {"_progress_bar_config": {"disable": True}, "maybe_free_model_hooks": lambda: None}
    vars(own).update(scheduler=scheduler, **quiet, **(parts or {}))
    return own


class Memo:
    """Remembers what a method answered to the same arguments, such as the encoding of a prompt.

    Attributes:
        missed: number of times that the method had to be asked.
        asking: whether it is being asked right now.
        tflop: what that took, counted while there is `count`, which tells the TFLOP so far.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.missed = 0
        self.asking = False
        self.tflop = 0.0
        self.count: Callable[[], float] | None = None
        self._known: list[tuple[Any, Any]] = []

    def wrap(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, asked only about what is new."""

        @functools.wraps(method)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            for asked, answer in self._known:
                if same(asked, (args, kwargs)):
                    return answer
            self.missed += 1
            before = self.count() if self.count else 0.0
            self.asking = True
            try:
                answer = method(*args, **kwargs)
            finally:
                self.asking = False
            self.tflop += self.count() - before if self.count else 0.0
            self._known.append(((args, kwargs), answer))
            if self.limit and len(self._known) > self.limit:
                del self._known[0]
            return answer

        return remembered

    def forget(self) -> None:
        """Forget all answers."""
        self._known.clear()


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


class StockCall:
    """One candidate's call of the pipeline; it runs until it is through the next step, and waits there.

    A call belongs to the thread that began it and goes forward only. When it is no longer referred to, it ends where it
    waits and frees its memory.

    Args:
        begin: makes the call; gets the function that its steps must be told to.

    Attributes:
        step: steps made.
        processors: attention processors that the call has put into the models, by model.
    """

    def __init__(self, begin: Callable[[OnStep], Any]) -> None:
        from greenlet import greenlet

        self.step = 0
        self.processors: dict[str, Any] = {}
        self._thread = threading.get_ident()
        # The greenlet must not lead back to this object: nobody could see then that it is no longer referred to.
        self._greenlet: greenlet = greenlet(functools.partial(begin, _wait))
        self._greenlet.gr_context = contextvars.copy_context()

    @property
    def done(self) -> bool:
        """Whether the call has returned or failed."""
        return bool(self._greenlet.dead)

    def waits_at(self, step: int) -> bool:
        """Whether the call waits after this step, and can be resumed from here."""
        return bool(self.step == step and self._greenlet and self._thread == threading.get_ident())

    def resume(self) -> Any:
        """Run through the next step and return it, or to the end and return what the pipeline does.

        Gradients must be off: a pipeline switches them off for its call, and back to what they were when it ends.
        """
        from greenlet import getcurrent

        assert not torch.is_grad_enabled()
        self._greenlet.parent = getcurrent()
        answer = self._greenlet.switch()
        if not self.done:
            self.step += 1
        return answer

    def __del__(self) -> None:
        waiting: Any = getattr(self, "_greenlet", None)
        if waiting and self._thread == threading.get_ident():  # true where it has begun and not ended
            from greenlet import getcurrent

            grad = torch.is_grad_enabled()
            waiting.parent = getcurrent()
            waiting.throw()  # GreenletExit
            torch.set_grad_enabled(grad)


def _wait(step: Step) -> Any:
    """Hand a step to whoever resumed the call, and wait for the next time."""
    from greenlet import getcurrent

    parent = getcurrent().parent
    assert parent is not None
    parent.switch(step)
    return step.result
