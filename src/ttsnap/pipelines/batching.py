"""Arguments of model calls as trees: which of their leaves are rows, several of them as one, an answer in parts.

A model call of one candidate has `rows` rows: one, or two where classifier-free guidance doubles the batch, or more.
The rows of several candidates are interleaved as a stock pipeline with `num_images_per_prompt` has them: all first
rows, then all second ones. So the batch of one prompt is the stock batch, to the last bit, and models that split their
batch in halves or thirds find what they expect.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Unlike(ValueError):
    """These calls cannot be one: says which argument keeps them apart."""


class Row(NamedTuple):
    """A tensor with `size` neighbouring entries of its first dimension per row: 1, or frames folded into the batch.

    With `mask`: texts [rows, words, width] of any length; the argument of that name tells which words are there.
    """

    size: int = 1
    mask: str | None = None


class Mask(NamedTuple):
    """Which words of texts are there [rows, words]; None where all of them are."""


class RowList(NamedTuple):
    """A list with one item per row."""


class Shared(NamedTuple):
    """What all candidates have in common."""


class Scalar(NamedTuple):
    """A timestep without dimension, which the model takes with one entry per row just as well."""


Mark = Row | Mask | RowList | Shared | Scalar
Path = tuple[Hashable, ...]


@dataclass(frozen=True)
class Layout:
    """Which arguments of a model call are rows.

    Attributes:
        rows: of one candidate's call.
        marks: what each leaf is, by its place; others are judged by their shapes.
    """

    rows: int
    marks: dict[Path, Mark]

    def fits(self, tree: Any) -> bool:
        """Whether arguments have as many rows as these marks say."""
        for path, mark in self.marks.items():
            if isinstance(mark, Row | RowList):
                leaf = tree
                for name in path:
                    leaf = leaf[name]
                if leaf is None or len(leaf) != self.rows * getattr(mark, "size", 1):
                    return False
        return True

    @property
    def lists(self) -> bool:
        """Whether the model takes, and so answers with, lists of rows."""
        return any(isinstance(mark, RowList) for mark in self.marks.values())

    def mark(self, path: Path, leaf: Any) -> Mark:
        """What a leaf is."""
        known = self.marks.get(path)
        if known is not None:
            return known
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == self.rows:
            return Row()
        return Shared()


def learn(one: Any, two: Any) -> Layout:
    """The layout of a call, from the arguments of the same call for one image and for two.

    Raises:
        Unlike: they differ otherwise than in their rows; the message names the argument.
    """
    found: dict[Path, Mark | int] = dict(_compare(one, two, ()))
    sizes = [size for size in found.values() if isinstance(size, int)]
    if not sizes:
        raise Unlike("no argument grows with the number of images")
    rows = min(sizes)
    marks: dict[Path, Mark] = {}
    for path, mark in found.items():
        if isinstance(mark, int):
            if mark % rows:
                raise Unlike(f"{named(path)} has {mark} entries beside {rows} rows")
            marks[path] = Row(mark // rows)
        else:
            marks[path] = mark
    return Layout(rows, marks)


def _compare(one: Any, two: Any, path: Path) -> Iterator[tuple[Path, Mark | int]]:
    """Places and marks; of row tensors the length of their first dimension, for one image."""
    if isinstance(one, torch.Generator):
        yield path, Shared()
    elif isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.shape == two.shape:
            yield path, Shared()
        elif one.ndim == two.ndim and two.shape[0] == 2 * one.shape[0] and one.shape[1:] == two.shape[1:]:
            yield path, len(one)
        else:
            raise Unlike(f"{named(path)} has the shape {tuple(one.shape)} for one image, {tuple(two.shape)} for two")
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple):
        if len(two) == 2 * len(one) and one:
            yield path, RowList()
        elif len(one) == len(two):
            for key, (a, b) in enumerate(zip(one, two, strict=True)):
                yield from _compare(a, b, (*path, key))
        else:
            raise Unlike(f"{named(path)} has {len(one)} items for one image, {len(two)} for two")
    elif isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one:
            yield from _compare(one[key], two[key], (*path, key))
    elif type(one) is not type(two):
        raise Unlike(f"{named(path)} is another kind of thing for two images than for one")
    else:
        yield path, Shared()


def by_shape(arguments: Any, rows: int) -> list[Layout]:
    """Layouts that the arguments of one call allow, where a call for two images cannot be had; the likeliest first."""
    found: list[Layout] = []
    for inside, folded in ((True, False), (False, False), (False, True), (True, True)):
        marks: dict[Path, Mark] = {}
        _guess(arguments, rows, (), inside, folded, marks)
        if all(marks != known.marks for known in found):
            found.append(Layout(rows, marks))
    return found


def _guess(tree: Any, rows: int, path: Path, inside: bool, folded: bool, marks: dict[Path, Mark]) -> None:
    """Marks by shape; `inside`: also of what lies within lists, `folded`: also several entries per row."""
    if isinstance(tree, Tensor):
        first = tree.shape[0] if tree.ndim else 0
        whole = first == rows or (folded and first > rows and first % rows == 0)
        marks[path] = Row(first // rows) if first and whole and (inside or len(path) < 2) else Shared()
    elif isinstance(tree, list | tuple):
        tensors = bool(tree) and all(isinstance(item, Tensor) for item in tree)
        rowed = tensors and all(item.ndim and item.shape[0] == rows for item in tree)
        if isinstance(tree, list) and tensors and len(tree) == rows and not rowed:
            marks[path] = RowList()
            return
        for number, item in enumerate(tree):
            _guess(item, rows, (*path, number), inside, folded, marks)
    elif isinstance(tree, dict):
        for name, item in tree.items():
            _guess(item, rows, (*path, name), inside, folded, marks)


def grown(layout: Layout, guess: Layout) -> Layout:
    """A layout in which also those are rows that have as many entries as there are rows."""
    more = {path: mark for path, mark in guess.marks.items() if isinstance(mark, Row) and mark.size == 1}
    both = {path: more.get(path, mark) if isinstance(mark, Shared) else mark for path, mark in layout.marks.items()}
    return Layout(layout.rows, both)


def mark_texts(layout: Layout, tree: Any) -> None:
    """Mark texts that the model takes a mask for, by the names that models of diffusers give to it."""
    for (name, *inside), mark in list(layout.marks.items()):
        text = tree.get(name)
        if mark != Row() or inside or not isinstance(name, str) or not isinstance(text, Tensor) or text.ndim != 3:
            continue
        for mask in {f"{name}_mask", name.replace("hidden_states", "attention_mask")} & tree.keys() - {name}:
            if tree[mask] is None or (isinstance(tree[mask], Tensor) and tree[mask].shape == text.shape[:2]):
                layout.marks[name,] = Row(mask=mask)
                layout.marks[mask,] = Mask()


def unmark_texts(layout: Layout) -> None:
    """From now on texts must have one length to be merged."""
    for path, mark in list(layout.marks.items()):
        if type(mark) is Row and mark.mask is not None:
            layout.marks[path] = Row()
        elif isinstance(mark, Mask):
            del layout.marks[path]


def texts(layout: Layout) -> list[tuple[Any, str]]:
    """Arguments that are texts of any length, each with that of its mask."""
    return [(path[0], mark.mask) for path, mark in layout.marks.items() if type(mark) is Row and mark.mask is not None]


def padded(trees: Sequence[dict[Any, Any]], layout: Layout) -> Sequence[dict[Any, Any]]:
    """Arguments with the same `key`, their texts as long as the longest: zeros where the mask tells of no word."""
    found = texts(layout)
    if not found:
        return trees
    made = [dict(tree) for tree in trees]
    for name, mask in found:
        longest = max(tree[name].shape[1] for tree in trees)
        given = [tree[mask] for tree in trees if tree[mask] is not None]
        if not given and all(tree[name].shape[1] == longest for tree in trees):
            continue
        for tree in made:
            text, words = tree[name], tree[mask]
            if words is None:
                words = text.new_ones(text.shape[:2], dtype=given[0].dtype if given else torch.bool)
            missing = longest - text.shape[1]
            tree[name] = torch.nn.functional.pad(text, (0, 0, 0, missing))
            tree[mask] = torch.nn.functional.pad(words, (0, missing))
    return made


class Values:
    """Numbers for values that candidates share, equal for equal ones, without waiting for an accelerator each time.

    A tensor on an accelerator is compared when it is seen for the first time; the same memory is known again. What was
    seen is kept, so that its memory cannot become another tensor's meanwhile.
    """

    LIMIT = 256  # tensors that are kept

    def __init__(self) -> None:
        self._places: dict[Hashable, tuple[int, Tensor]] = {}
        self._kinds: dict[Hashable, list[tuple[int, Tensor]]] = {}
        self._count = 0

    def clear(self) -> None:
        """Forget all."""
        self._places.clear()
        self._kinds.clear()

    def number(self, tensor: Tensor) -> Hashable:
        """A key that is equal for equal tensors."""
        kind = (tensor.dtype, tensor.shape)
        if tensor.device.type == "cpu" and tensor.numel() == 1:
            return (*kind, tensor.item())
        place = (tensor.data_ptr(), tensor.stride(), tensor._version, tensor.device, *kind)
        known = self._places.get(place)
        if known is not None:
            return known[0]
        if len(self._places) >= self.LIMIT:
            self.clear()
        alike = self._kinds.setdefault((tensor.device, *kind), [])
        number = next((number for number, other in alike if torch.equal(other, tensor)), None)
        if number is None:
            self._count += 1
            number = self._count
            alike.append((number, tensor.clone()))
        self._places[place] = number, tensor
        return number


def key(tree: Any, layout: Layout, values: Values, path: Path = ()) -> Hashable:
    """What calls must have in common to be merged: structure, shapes of rows, and what is shared."""
    if tree is None or type(tree) is bool:
        return tree if type(layout.marks.get(path)) is not Mask else "mask"
    if isinstance(tree, Tensor):
        mark = layout.marks.get(path) or layout.mark(path, tree)
        if type(mark) is Row:
            return tree.dtype, tree.shape if mark.mask is None else (tree.shape[0], tree.shape[2:])
        if type(mark) is Mask:
            return "mask"
        if isinstance(mark, Scalar) and not tree.ndim:
            return tree.dtype
        return values.number(tree)
    if isinstance(tree, list | tuple):
        if isinstance(layout.marks.get(path), RowList):
            return tuple(_row_key(item) for item in tree)
        return tuple([key(item, layout, values, (*path, number)) for number, item in enumerate(tree)])
    if isinstance(tree, dict):
        return tuple([(name, key(item, layout, values, (*path, name))) for name, item in tree.items()])
    if isinstance(tree, str | int | float | bool | torch.dtype | torch.device):
        return type(tree), tree
    if isinstance(tree, torch.Generator):
        return "generator"  # calls that draw from one are never merged
    if isinstance(tree, np.ndarray):
        return tree.dtype.str, tree.shape, tree.tobytes()
    return id(tree)


class Seen:
    """Arguments whose key is known, so that the next ones like them need not be gone through.

    Args:
        tree: the arguments,
        layout: what their leaves are,
        key: and their key.

    Attributes:
        of_use: whether it can be told at all that others have the same key.
    """

    def __init__(self, tree: dict[Any, Any], layout: Layout, key: Hashable = None, path: Path = ()) -> None:
        self.key = key
        self._rows: list[tuple[Hashable, torch.dtype, torch.Size]] = []
        self._shared: list[tuple[Hashable, Tensor, int]] = []
        self._plain: list[tuple[Hashable, Any]] = []
        self._inner: list[tuple[Hashable, Seen]] = []
        self._count = len(tree)
        self.of_use = all(self._known(name, value, layout, (*path, name)) for name, value in tree.items())

    def _known(self, name: Hashable, value: Any, layout: Layout, path: Path) -> bool:
        mark = layout.mark(path, value)
        if isinstance(mark, Mask):
            return False  # texts of any length may have to be of one yet
        if type(value) is dict:
            self._inner.append((name, inner := Seen(value, layout, path=path)))
            return inner.of_use
        if value is None or type(value) in (bool, str, int, float):
            self._plain.append((name, value))
            return True
        if not isinstance(value, Tensor):
            return False
        if isinstance(mark, Row) or (isinstance(mark, Scalar) and not value.ndim):
            self._rows.append((name, value.dtype, value.shape))
            return True
        self._shared.append((name, value, value._version))
        return value.numel() > 1  # a number is another one at each step

    def fits(self, tree: dict[Any, Any]) -> bool:
        """Whether these arguments are sure to have the same key."""
        if not self.of_use or len(tree) != self._count:
            return False
        try:
            for name, dtype, shape in self._rows:
                row = tree[name]
                if row.shape != shape or row.dtype != dtype:
                    return False
            for name, tensor, version in self._shared:
                if tree[name] is not tensor or tensor._version != version:
                    return False
            for name, value in self._plain:
                given = tree[name]
                if given is not value and (type(given) is not type(value) or given != value):
                    return False
            return all(type(tree[name]) is dict and inner.fits(tree[name]) for name, inner in self._inner)
        except (KeyError, AttributeError):  # another name, or no tensor
            return False


def shapes(tree: Any) -> Hashable:
    """What calls must have in common where it is not yet known which arguments are rows: the shapes of all."""
    if isinstance(tree, Tensor):
        return tree.dtype, tree.shape
    if isinstance(tree, list | tuple):
        return tuple([shapes(item) for item in tree])
    if isinstance(tree, dict):
        return tuple([(name, shapes(item)) for name, item in tree.items()])
    return tree if isinstance(tree, str | int | float | bool | None) else type(tree).__name__


def _row_key(item: Any) -> Hashable:
    """What the items of a list of rows share; texts [words, width] may be of any length, as the model pads them."""
    if not isinstance(item, Tensor):
        return id(item)
    return item.dtype, item.shape[1:] if item.ndim == 2 else item.shape


def difference(one: Any, two: Any, layout: Layout, values: Values, path: Path = ()) -> Path | None:
    """The place of what keeps two calls apart; None where nothing does."""
    inside = isinstance(one, dict) or (
        isinstance(one, list | tuple) and not isinstance(layout.marks.get(path), RowList)
    )
    if not inside or type(one) is not type(two) or len(one) != len(two):
        return None if key(one, layout, values, path) == key(two, layout, values, path) else path
    names = one if isinstance(one, dict) else range(len(one))
    found = (
        difference(one[name], two[name], layout, values, (*path, name))
        for name in names
        if isinstance(one, list | tuple) or name in two
    )
    return next((place for place in found if place is not None), None)


def merge(parts: Sequence[Any], layout: Layout, path: Path = ()) -> Any:
    """Arguments of several calls with the same `key` as those of one."""
    first = parts[0]
    if isinstance(first, Tensor):
        mark = layout.mark(path, first)
        if isinstance(mark, Row | Mask):
            return join(parts, layout.rows)
        if isinstance(mark, Scalar) and not first.ndim:
            if all(part.data_ptr() == first.data_ptr() for part in parts):
                return first
            return torch.stack(list(parts)).repeat(layout.rows)
        return first
    if isinstance(first, list | tuple):
        if isinstance(layout.marks.get(path), RowList):
            return type(first)(part[row] for row in range(len(first)) for part in parts)
        items = [merge(items, layout, (*path, number)) for number, items in enumerate(zip(*parts, strict=True))]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    if isinstance(first, dict):
        return {name: merge([part[name] for part in parts], layout, (*path, name)) for name in first}
    return first


def join(parts: Sequence[Tensor], rows: int) -> Tensor:
    """Tensors of `rows` rows each as one, all first rows before all second ones."""
    if rows == 1:
        return torch.cat(list(parts))
    shape = parts[0].shape
    size = shape[0] // rows
    return torch.stack([part.reshape(rows, size, *shape[1:]) for part in parts], 1).flatten(0, 2)


def split(answer: Any, count: int, layout: Layout) -> list[Any]:
    """The answer to a merged call, one part for each of the `count` calls.

    Raises:
        Unlike: a tensor does not divide into that many.
    """
    rows = layout.rows
    if isinstance(answer, Tensor):
        if not answer.ndim:
            return [answer] * count
        size, rest = divmod(answer.shape[0], count * rows)
        if rest or not size:
            raise Unlike(f"the answer has {answer.shape[0]} entries for {count} times {rows} rows")
        if rows == 1:
            return list(answer.chunk(count))
        shares = answer.reshape(rows, count, size, *answer.shape[1:])
        return [shares[:, number].flatten(0, 1) for number in range(count)]
    if isinstance(answer, list) and layout.lists and len(answer) == count * rows:
        return [answer[number::count] for number in range(count)]
    if isinstance(answer, list | tuple):
        columns = [split(item, count, layout) for item in answer]
        rebuilt = [[column[number] for column in columns] for number in range(count)]
        if hasattr(answer, "_fields"):
            return [type(answer)(*items) for items in rebuilt]
        return [type(answer)(items) for items in rebuilt]
    names = list(answer) if isinstance(answer, dict) else list(getattr(answer, "__dataclass_fields__", ()))
    if not names:
        return [answer] * count
    parts = {
        name: split(answer[name] if isinstance(answer, dict) else getattr(answer, name), count, layout)
        for name in names
    }
    return [type(answer)(**{name: part[number] for name, part in parts.items()}) for number in range(count)]


def rows_of(answer: Any) -> int:
    """Rows of a model's answer to one call: the first dimension of its first tensor, or the length of a list."""
    if isinstance(answer, Tensor):
        return answer.shape[0] if answer.ndim else 1
    if isinstance(answer, list):
        return len(answer)
    if isinstance(answer, dict):
        return rows_of(next(iter(answer.values())))
    if hasattr(answer, "__dataclass_fields__"):
        return rows_of(getattr(answer, next(iter(answer.__dataclass_fields__))))
    if isinstance(answer, tuple) and answer:
        whole = [item for item in answer if isinstance(item, Tensor)]  # beside lists such as a ControlNet's residuals
        return rows_of(whole[0] if whole else answer[0])
    return 1


def named(path: Path) -> str:
    """The argument at a place, for a message."""
    parts = [str(part) for part in path if part not in (0, 1) or len(path) < 2]
    return ".".join(parts) or "an argument"
