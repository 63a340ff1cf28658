"""Arguments of several calls as one, and the answer in parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ttsnap.pipelines.batching import (
    Layout,
    Row,
    RowList,
    Scalar,
    Seen,
    Shared,
    Unlike,
    Values,
    by_shape,
    difference,
    key,
    learn,
    mark_texts,
    merge,
    padded,
    rows_of,
    split,
    unmark_texts,
)

sizes = st.integers(1, 4)


def call(rows, folded, seed, words=5):
    """Arguments of one candidate's call: rows, rows with frames folded in, a list of rows, and what is shared."""
    draw = torch.Generator().manual_seed(seed)
    return {
        0: torch.randn(rows, 3, 2, generator=draw),
        "words": torch.randn(rows * folded, words, generator=draw),
        "each": [torch.randn(2, 2, generator=draw) for _ in range(rows)],
        "inner": {"pooled": torch.randn(rows, 4, generator=draw), "ids": torch.arange(7)},
        "t": torch.tensor(3.0),
        "flag": True,
        "none": None,
    }


def layout(rows, folded):
    marks = {(0,): Row(), ("words",): Row(folded), ("each",): RowList(), ("inner", "pooled"): Row()}
    return Layout(rows, {**marks, ("inner", "ids"): Shared(), ("t",): Shared()})


@given(sizes, sizes, sizes)
def test_what_is_merged_comes_apart_as_it_was(count, rows, folded):
    calls, how = [call(rows, folded, seed) for seed in range(count)], layout(rows, folded)
    assert len({key(one, how, Values()) for one in calls[:1]}) == 1
    whole = merge(calls, how)
    parts = split((whole[0], whole["words"]), count, how)
    for one, (first, words) in zip(calls, parts, strict=True):
        assert torch.equal(first, one[0])
        assert torch.equal(words, one["words"])
    apart = split(whole["each"], count, how)
    assert all(
        torch.equal(a, b)
        for one, back in zip(calls, apart, strict=True)
        for a, b in zip(one["each"], back, strict=True)
    )
    assert whole["inner"]["ids"] is calls[0]["inner"]["ids"]


@given(sizes, sizes)
def test_rows_are_interleaved_as_guidance_doubles_a_stock_batch(count, rows):
    calls, how = [call(rows, 1, seed) for seed in range(count)], layout(rows, 1)
    stock = torch.cat([torch.stack([one[0][row] for one in calls]) for row in range(rows)])
    assert torch.equal(merge(calls, how)[0], stock)


@given(sizes, sizes)
def test_rows_are_learnt_from_calls_for_one_and_for_two_images(rows, folded):
    one, two = call(rows, folded, 0), call(2 * rows, folded, 1)
    found = learn(one, two)
    assert found.rows == rows
    assert {path: mark for path, mark in found.marks.items() if not isinstance(mark, Shared)} == {
        path: mark for path, mark in layout(rows, folded).marks.items() if not isinstance(mark, Shared)
    }


def test_what_grows_otherwise_is_named():
    one = {"hidden": torch.zeros(2, 3), "odd": torch.zeros(5)}
    with pytest.raises(Unlike, match="odd has the shape"):
        learn(one, {"hidden": torch.zeros(4, 3), "odd": torch.zeros(7)})
    with pytest.raises(Unlike, match="no argument grows"):
        learn(one, one)


def test_shapes_allow_several_layouts_where_they_tell_too_little():
    guesses = by_shape(
        {"x": torch.zeros(2, 4), "rope": (torch.zeros(2, 8), torch.zeros(2, 8)), "w": torch.zeros(6, 3)}, 2
    )
    ropes = {guess.marks["rope", 0] for guess in guesses}
    words = {guess.marks["w",] for guess in guesses}
    assert ropes == {Row(), Shared()}
    assert words == {Row(3), Shared()}
    assert len(by_shape({"x": torch.zeros(1, 4), "flag": True}, 1)) == 1


def test_timesteps_without_dimension_become_rows_where_they_differ():
    how = Layout(2, {("t",): Scalar(), ("x",): Row()})
    same = torch.tensor([5.0, 6.0])
    calls = [{"x": torch.zeros(2, 3), "t": t} for t in same]
    assert merge(calls, how)["t"].tolist() == [5.0, 6.0, 5.0, 6.0]
    assert merge([calls[0], calls[0]], how)["t"].ndim == 0
    assert key(calls[0], how, Values()) == key(calls[1], how, Values())


def test_shared_values_keep_calls_apart_and_are_named():
    how, values = layout(1, 1), Values()
    one, other = call(1, 1, 0), call(1, 1, 1)
    assert key(one, how, values) == key(other, how, values)
    other["inner"]["ids"] = torch.arange(7) + 1
    assert key(one, how, values) != key(other, how, values)
    assert difference(one, other, how, values) == ("inner", "ids")
    other = call(1, 1, 1, words=6)
    assert difference(one, other, how, values) == ("words",)


def test_an_answer_that_does_not_divide_is_refused():
    with pytest.raises(Unlike, match="5 entries for 2 times 1 rows"):
        split(torch.zeros(5, 2), 2, Layout(1, {}))
    assert rows_of(([torch.zeros(3, 1)] * 7, torch.zeros(3, 2))) == 3


def texts_of(*lengths, masks=True):
    torch.manual_seed(0)
    made = []
    for length in lengths:
        mask = torch.ones(1, length, dtype=torch.int64) if masks else None
        text = torch.randn(1, length, 3)
        rows = {"hidden_states": torch.randn(1, 5, 3), "encoder_hidden_states": text}
        made.append({**rows, "encoder_attention_mask": mask})
    return made


@pytest.mark.parametrize("masks", [True, False])
def test_texts_of_any_length_are_merged_where_there_is_a_mask(masks):
    trees = texts_of(4, 2, masks=masks)
    layout = Layout(1, {("hidden_states",): Row(), ("encoder_hidden_states",): Row()})
    values = Values()
    assert key(trees[0], layout, values) != key(trees[1], layout, values)
    mark_texts(layout, trees[0])
    assert key(trees[0], layout, values) == key(trees[1], layout, values)
    merged = merge(padded(trees, layout), layout)
    assert merged["encoder_hidden_states"].shape == (2, 4, 3)
    assert merged["encoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    torch.testing.assert_close(merged["encoder_hidden_states"][1, :2], trees[1]["encoder_hidden_states"][0])
    assert not merged["encoder_hidden_states"][1, 2:].any()
    unmark_texts(layout)
    assert key(trees[0], layout, values) != key(trees[1], layout, values)


def test_texts_of_one_length_stay_without_a_mask():
    trees = texts_of(4, 4, masks=False)
    layout = Layout(1, {("hidden_states",): Row(), ("encoder_hidden_states",): Row()})
    mark_texts(layout, trees[0])
    assert merge(padded(trees, layout), layout)["encoder_attention_mask"] is None


def test_a_key_that_was_seen_is_that_of_arguments_like_them():
    def flat(rows, seed, ids):
        given = call(rows, 1, seed)
        kept = {name: value for name, value in given.items() if name not in ("each", "t")}
        return {**kept, "inner": {**given["inner"], "ids": ids}, "scale": 1.5}

    how, values, ids = layout(1, 1), Values(), torch.arange(7)
    one, like = flat(1, 0, ids), flat(1, 1, ids)
    seen = Seen(one, how, key(one, how, values))
    assert seen.fits(one)
    assert seen.fits(like)
    assert key(like, how, values) == seen.key
    others = [flat(2, 0, ids), flat(1, 0, ids + 1), {**like, "more": 1}, {**like, "inner": {}}]
    others += [{k: v for k, v in like.items() if k != name} for name in like]
    others += [{**like, name: other} for name in like for other in (None, 3, torch.zeros(9), {}, [1])]
    for other in others:
        assert not seen.fits(other) or key(other, how, values) == seen.key
    assert [seen.fits(other) for other in others].count(True) == 1  # where None was None
    ids += 1
    assert not seen.fits(like)


def test_numbers_and_masked_texts_are_looked_at_each_time():
    step = {"x": torch.zeros(1, 3), "t": torch.tensor(5.0)}
    assert not Seen(step, Layout(1, {("x",): Row(), ("t",): Shared()}), 1).fits(step)
    assert Seen(step, Layout(1, {("x",): Row(), ("t",): Scalar()}), 1).fits({**step, "t": torch.tensor(6.0)})
    (text,) = texts_of(4)
    marked = Layout(1, {("hidden_states",): Row(), ("encoder_hidden_states",): Row()})
    mark_texts(marked, text)
    assert not Seen(text, marked, 1).of_use
