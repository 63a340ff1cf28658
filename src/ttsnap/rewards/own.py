"""A reward of one's own, called as every other: whatever pictures it takes, and with or without the noise level.

    def judge(images, prompts): ...                                   # tensor [n, 3, h, w] in 0..1, where it takes one
    def judge(images: list[PIL.Image.Image], prompts): ...            # a list of PIL pictures
    def judge(images: np.ndarray, prompts): ...                       # array [n, h, w, 3], uint8

What it takes is read from the annotation of its first parameter. Where there is none it is given a tensor, and where
that is of the wrong kind for it (a TypeError, AttributeError or ValueError), PIL pictures, then an array; what it
answers to the first time, which is when it is tried on two pictures, is what it is given from then on.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

KINDS = {"tensor": "a tensor", "pil": "PIL pictures", "numpy": "an array"}
_ANNOTATED = {"tensor": "Tensor", "numpy": "ndarray", "pil": "Image"}  # parts of annotations, the surest first
_WRONG_KIND = (TypeError, AttributeError, ValueError)
_found: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # what callables turned out to take


class OwnReward:
    """A callable as a reward: `own(images, prompts, sigma=...)`; its other attributes are the callable's.

    Attributes:
        judge: the callable.
        takes: `tensor`, `pil` or `numpy`; None: not known before its first pictures.
        told: whether it takes `sigma`.
    """

    def __init__(self, judge: Callable[..., Any], takes: str | None, told: bool) -> None:
        self.judge, self.takes, self.told = judge, takes, told

    def __call__(self, images: Any, prompts: Sequence[str], *, sigma: float) -> Any:
        """What the callable says of images [n, 3, h, w] in 0..1."""
        if self.takes is not None:
            return self._ask(self.takes, images, prompts, sigma)
        failed: dict[str, Exception] = {}
        for kind in KINDS:
            try:
                answer = self._ask(kind, images, prompts, sigma)
            except _WRONG_KIND as error:
                failed[kind] = error
            else:
                self.takes = kind
                with contextlib.suppress(TypeError):  # not every callable can be remembered
                    _found[self.judge] = kind
                return answer
        raise _one(failed)

    def _ask(self, kind: str, images: Any, prompts: Sequence[str], sigma: float) -> Any:
        shown = images if kind == "tensor" else pictures(images) if kind == "pil" else array(images)
        return self.judge(shown, prompts, sigma=sigma) if self.told else self.judge(shown, prompts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "judge":
            raise AttributeError(name)
        return getattr(self.judge, name)


def adapt(judge: Callable[..., Any]) -> Callable[..., Any]:
    """A callable as a reward; ttsnap's own are as they are."""
    if isinstance(judge, OwnReward) or type(getattr(judge, "__self__", judge)).__module__.startswith("ttsnap."):
        return judge
    try:
        parameters = list(inspect.signature(judge).parameters.values())
    except (TypeError, ValueError):  # of compiled callables nothing is known
        return judge
    told = any(p.name == "sigma" or p.kind is p.VAR_KEYWORD for p in parameters)
    takes = _said(parameters)
    with contextlib.suppress(TypeError):
        takes = takes or _found.get(judge)
    return OwnReward(judge, takes, told)


def array(images: Any) -> Any:
    """Images [n, 3, h, w] in 0..1 as an array [n, h, w, 3] of 8 bits, as their files hold them."""
    from ttsnap.pipelines.outputs import to_uint8

    return to_uint8(images.detach().float())


def pictures(images: Any) -> list[Any]:
    """Images [n, 3, h, w] in 0..1 as PIL pictures."""
    from PIL import Image

    return [Image.fromarray(one) for one in array(images)]


def _said(parameters: Sequence[inspect.Parameter]) -> str | None:
    """What the annotation of the first parameter says that it takes."""
    said = str(parameters[0].annotation) if parameters else ""
    return next((kind for kind, word in _ANNOTATED.items() if word in said), None)


def _one(failed: dict[str, Exception]) -> Exception:
    """What to raise where every kind of picture failed."""
    said = {kind: f"{type(error).__name__}: {' '.join(str(error).split())}" for kind, error in failed.items()}
    if len(set(said.values())) == 1:
        return failed["tensor"]
    return TypeError("; ".join(f"given {KINDS[kind]}, {what}" for kind, what in said.items()))
