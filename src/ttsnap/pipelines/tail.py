"""What a pipeline does with its last latents, taken down once and done again for any x0 estimate.

Only the pipeline knows how its latents become a picture: how they are unpacked, rescaled, decoded and clamped. While
the first call of a pipeline goes from its last step to its end, every tensor operation that depends on the latents is
taken down. Done again, the same operations make a picture of any x0 estimate, without a call; what they hand to the
decoder is the latent in the shape of a picture, whatever shape the denoiser gave it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ttsnap.pipelines.call import Ask


@dataclass(frozen=True)
class Slot:
    """The place of a tensor that depends on the latents."""

    number: int


@dataclass(frozen=True)
class Work:
    """One operation: a tensor operation, or a model call (`what` is an `Ask` then)."""

    what: Any
    args: Any
    kwargs: Any
    made: Any


@dataclass
class Tail:
    """The way from latents to a picture.

    Attributes:
        works: operations in order.
        image: where the picture is in the end,
        last: whether with its colours last.
    """

    works: list[Work]
    image: Slot
    last: bool

    @torch.no_grad()
    def run(self, latents: Tensor) -> Generator[Ask, Any, Tensor]:
        """Yields the model calls, is sent their answers, and returns a picture [1, 3, h, w] (videos: with frames).

        Args:
            latents: of one candidate, as its scheduler has them.
        """
        known: dict[int, Tensor] = {0: latents.clone()}

        def filled(tree: Any) -> Any:
            return tree_map(lambda x: known[x.number] if isinstance(x, Slot) else x, tree)

        for work in self.works:
            if isinstance(work.what, Ask):
                answer = yield work.what.filled(filled(work.args))
            else:
                answer = work.what(*filled(work.args), **filled(work.kwargs))
            for slot, value in zip(_leaves(work.made), _leaves(answer), strict=True):
                if isinstance(slot, Slot):
                    known[slot.number] = value
        image = known[self.image.number]
        return image.movedim(-1, -3) if self.last else image


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes down what is done with some tensors, while it is entered."""

    def __init__(self, latents: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.works: list[Work] = []
        self.sound = True  # whether all of it can be done again
        self._known: dict[int, tuple[int, Tensor]] = {id(tensor): (0, tensor) for tensor in latents}
        self._count = 0
        self._asked: Ask | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = func(*args, **kwargs)
        if any(id(leaf) in self._known for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)):
            if func is torch.ops.aten._local_scalar_dense.default:
                self.sound = False
            given, named = self._places(args), self._places(kwargs)
            self.works.append(Work(func, given, named, self._new(answer)))
        return answer

    def asked(self, ask: Ask) -> None:
        """A model is called."""
        self._asked = ask

    def answered(self, answer: Any) -> None:
        """It has answered."""
        ask = self._asked
        assert ask is not None
        if not any(id(leaf) in self._known for leaf in _leaves(ask.tree) if isinstance(leaf, Tensor)):
            return
        places = self._places(ask.tree)
        empty = Ask(ask.model, ask.method, (None,) * len(ask.args), dict.fromkeys(ask.kwargs))
        self.works.append(Work(empty, places, {}, self._new(answer)))

    def _places(self, tree: Any) -> Any:
        return tree_map(
            lambda x: Slot(self._known[id(x)][0]) if isinstance(x, Tensor) and id(x) in self._known else x, tree
        )

    def _new(self, answer: Any) -> Any:
        def place(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in self._known:  # what is changed in place keeps its place
                self._count += 1
                self._known[id(value)] = (self._count, value)
            return Slot(self._known[id(value)][0])

        return tree_map(place, answer)

    def tail(self, images: Tensor) -> Tail | None:
        """What was taken down, if it made these images [1, 3, h, w] (videos with frames)."""
        if not self.sound:
            return None
        for number, tensor in sorted(self._known.values(), key=lambda pair: -pair[0]):
            if number == 0 or not tensor.is_floating_point() or tensor.numel() != images.numel():
                continue
            for last in (False, True):
                turned = tensor.movedim(-1, -3) if last and tensor.ndim > 2 else tensor
                if turned.shape == images.shape and torch.equal(turned.float().to(images.device), images):
                    return Tail([_staying(work) for work in self.works], Slot(number), last)
        return None


def _staying(work: Work) -> Work:
    """The operation without a move into main memory, where pipelines turn tensors into arrays."""
    if isinstance(work.kwargs, dict) and str(work.kwargs.get("device")) == "cpu":
        return Work(work.what, work.args, {k: v for k, v in work.kwargs.items() if k != "device"}, work.made)
    return work


def _leaves(tree: Any) -> list[Any]:
    from torch.utils._pytree import tree_leaves

    return tree_leaves(tree)
