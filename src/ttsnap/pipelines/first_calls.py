"""The first calls that are made of a pipeline: what only the pipeline knows is asked of it.

In the first call every model works where it comes in first, and from then on answers zeros of the same shapes; that
tells steps, noise levels, sizes, costs, and the way from the last latents to the picture. In the second, for two images
and with no model at work, what has doubled are the rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from ttsnap.pipelines.batching import Layout, Scalar, Shared, Unlike, by_shape, grown, learn, mark_texts, rows_of
from ttsnap.pipelines.call import END, Ask, Call, Progress, random_kept, watch_of
from ttsnap.pipelines.counting import counting
from ttsnap.pipelines.estimates import Level, Step
from ttsnap.pipelines.outputs import as_images
from ttsnap.pipelines.probe import Blank, Forward, Probe, blank, fake, zeros
from ttsnap.pipelines.running import Runner
from ttsnap.pipelines.tail import Tape

# UNets spread a timestep over their batch themselves, so that they take one per row just as well.
SPREADS_TIMESTEP = ("UNet2DConditionModel", "ControlNetModel", "UNetMotionModel", "UNet3DConditionModel")
PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt")


@torch.no_grad()
def first_calls(sampler: Runner) -> Probe:
    """Ask a pipeline.

    Raises:
        ValueError: it does not run with these arguments, or cannot be searched; the message says why.
    """
    probe, name = Probe(), type(sampler.pipe).__name__
    try:
        try:
            call = _first(sampler, probe, counting)
        except Exception:  # the counter does not know all operations; if it was not the counter, it fails again
            probe = Probe()
            call = _first(sampler, probe, _not_counting, plainly=True)
            sampler.note(f"the TFLOP of {name} cannot be counted; budgets in NFE or seconds work")
        if not probe.num_steps and call.progress.unseen:
            probe = Probe(copies=True)
            call = _first(sampler, probe, counting)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} does not run with these arguments: {error}") from error
    except (AttributeError, LookupError, AssertionError) as error:  # libraries that do not fit together
        kind = type(error).__name__
        raise ValueError(f"{name} does not run with these arguments: {kind}: {error}") from error
    if not probe.num_steps:
        left = "; with more steps or a higher strength it would" if sampler.arguments.get("strength") else ""
        raise ValueError(f"{name} made no step of its scheduler, so that its calls cannot be suspended{left}")
    _two_images(sampler, probe)
    _mark_timesteps(sampler, probe)
    return probe


def _first(sampler: Runner, probe: Probe, counted: Callable[[torch.device], Any], *, plainly: bool = False) -> Call:
    steps: list[Step] = []
    schedulers: list[int] = []
    tape: Tape | None = None
    with counted(sampler.device) as count, random_kept(sampler.device):
        for memo in sampler.memos:
            memo.count = count
        progress = Progress(target=1, copies=probe.copies)
        call = sampler.begin(sampler.some_prompt, 0, progress=progress, everything=True)
        drawn = call.random[0]
        before = 0.0
        while not call.done:
            with tape or nullcontext():
                call.forward()
            if call.error:
                raise call.error
            if call.ask is not None:
                probe.decoded = probe.decoded or call.ask
                if tape:
                    tape.asked(call.ask)
                answer = _answer(sampler, probe, call, count)
                if tape:
                    tape.answered(answer)
                call.answer(answer)
            elif not call.done:
                last = progress.last
                assert last is not None
                steps.append(last)
                if not probe.copies:
                    probe.levels.append(last.level)
                    if len(steps) == 1:
                        _ = last.clean  # complains here about schedulers that are not known
                else:
                    probe.levels.append(_guess(last))
                probe.timesteps.append(float(torch.as_tensor(last.timestep).flatten()[0]))
                schedulers.append(watch_of(last.scheduler).origin)
                sampler.notice_processors()
                before, probe.decoded = count(), None
                tape = None if plainly else Tape(_latents(last))
                progress.target += 1
    for memo in sampler.memos:
        memo.count = None
    if not steps:
        return call
    if len(set(schedulers)) > 1:  # the steps of inner pipelines belong to what is made before the first step
        probe.main = schedulers[-1]
        kept = [number for number, origin in enumerate(schedulers) if origin == probe.main]
        probe.levels = [probe.levels[number] for number in kept]
        probe.timesteps = [probe.timesteps[number] for number in kept]
        for forward in probe.forwards:
            forward.step = sum(number < forward.step for number in kept)
    last = steps[-1]
    probe.batched = len(last.sample) == 1
    probe.result, probe.sample = blank(last.result), last.sample.shape
    probe.latents = next(iter(_latents(last)), probe.latents)
    probe.random = not torch.equal(drawn, call.random[0])
    probe.tflop["decode"] = count() - before
    texts = next(iter(sampler.texts.values()), None)
    probe.tflop["prompt"] = (texts.tflop if texts else 0.0) + sum(f.tflop for f in probe.encoders)
    probe.image = as_images(call.output, sampler.device)
    if tape and not probe.copies:
        probe.tail = tape.tail(probe.image)
    return call


def _guess(step: Step) -> Level:
    """The level of a step of one of many schedulers."""
    try:
        return step.level
    except (ValueError, IndexError, TypeError):
        time = float(torch.as_tensor(step.timestep).flatten()[0]) / 1000
        return Level(1 - time, time)


def _latents(step: Step) -> list[Tensor]:
    """The tensors in what a step returned that stand for the latents."""
    values = step.result if isinstance(step.result, tuple) else tuple(step.result.values())
    return [value for value in values if isinstance(value, Tensor) and value.shape == step.sample.shape]


def _answer(sampler: Runner, probe: Probe, call: Call, count: Callable[[], float]) -> Any:
    """A model's answer: real where it comes in first, zeros of the same shapes afterwards."""
    ask = call.ask
    assert ask is not None
    step = call.step
    remembered = any(memo.asking for memo in sampler.memos)
    alike = probe.alike(ask)
    first = alike[0].step if alike else step
    if first == step:
        before, state, random = count(), call.generator.get_state(), call.random[0]
        answer = call.within(lambda: sampler.work(ask))
        if not torch.equal(state, call.generator.get_state()) or not torch.equal(random, call.random[0]):
            probe.alone[ask.kind] = "draws random numbers of its own"
        made = Forward(ask, step, blank(answer), rows_of(answer), count() - before, remembered, step)
    else:
        made_first = [f for f in alike if f.step == first]
        like = made_first[sum(f.step == step for f in alike) % len(made_first)]
        answer = zeros(like.answer)
        made = Forward(ask, step, like.answer, like.rows, like.tflop, remembered, step)
    made.ask = Ask(ask.model, ask.method, blank(ask.args), blank(ask.kwargs))
    made.ask.context = ask.context
    probe.forwards.append(made)
    return answer


# Which arguments are rows.


def _two_images(sampler: Runner, probe: Probe) -> None:
    """Learn the layouts from a call for two images, or else from shapes."""
    needed = [f for f in probe.forwards if f.name in probe.merged or f.ask.method == "decode"]
    asks: list[Ask] = []
    for more in _two(sampler):
        asks.clear()
        with suppress(Exception), random_kept(sampler.device):  # what was asked until then is known
            _ask_for_two(sampler, probe, needed, more, asks)
        if asks:
            break
    found: dict[Any, Layout] = {}
    for forward, two in zip(needed, asks, strict=False):
        if two.form != forward.ask.form:
            break
        try:
            layout = learn(fake(forward.ask.tree), two.tree)
        except Unlike:  # then its shape must tell
            continue
        known = found.setdefault((forward.ask.form, layout.rows), layout)
        known.marks.update({path: mark for path, mark in layout.marks.items() if not isinstance(mark, Shared)})
    for forward in needed:
        tree = fake(forward.ask.tree)
        guesses = by_shape(tree, forward.rows)
        learnt = [layout for (form, _), layout in found.items() if form == forward.ask.form]
        for layout in (*learnt, *guesses):
            mark_texts(layout, tree)
        for layout in learnt or guesses[:1]:
            name = forward.ask.form, layout.rows
            if name not in probe.guesses:  # what models are given without rows beside rows can have them too
                more_rows = grown(layout, guesses[0])
                others = guesses if not learnt else [layout, *([more_rows] if more_rows.marks != layout.marks else [])]
                probe.layouts.setdefault(forward.ask.form, []).append(layout)
                probe.guesses[name] = others
    probe.sure = {name for name, guesses in probe.guesses.items() if len(guesses) == 1}


def _two(sampler: Runner) -> Iterator[dict[str, Any]]:
    """Ways to ask a pipeline for two images."""
    given = sampler.arguments
    for name in PER_PROMPT:
        if name in sampler.taken:
            yield {name: 2}
    if "prompt_embeds" in given:
        return
    texts = {"prompt": sampler.some_prompt} | {
        key: v for key, v in given.items() if "prompt" in key and isinstance(v, str)
    }
    yield {key: [value] * 2 for key, value in texts.items()}
    pictures = {key: value for key, value in given.items() if "image" in key}
    if pictures:
        yield {key: [value] * 2 for key, value in (texts | pictures).items()}


def _ask_for_two(sampler: Runner, probe: Probe, needed: list[Forward], more: dict[str, Any], asks: list[Ask]) -> None:
    """Make a call for two images; `asks` receives its model calls that are to be merged, in order."""
    more = more | {"generator": [torch.Generator("cpu").manual_seed(seed) for seed in (0, 1)]}
    progress = Progress(target=END, main=probe.main, copies=probe.copies)
    call = sampler.begin(sampler.some_prompt, 0, progress=progress, more=more, everything=True)
    try:
        while len(asks) < len(needed):
            call.forward()
            if call.error:
                raise call.error
            ask = call.ask
            if ask is None:
                return
            if ask.model not in probe.merged and ask.method != "decode":
                call.answer(call.within(lambda ask=ask: sampler.work(ask)))  # type: ignore[misc]
                continue
            like = needed[len(asks)]
            if ask.kind != like.ask.kind:
                raise Unlike(f"{ask.model} comes where {like.name} did")
            asks.append(Ask(ask.model, ask.method, fake(blank(ask.args)), fake(blank(ask.kwargs))))
            call.answer(zeros(_doubled(like.answer, learn(fake(like.ask.tree), ask.tree))))
    finally:
        call.close()
        sampler.reset_processors()


def _doubled(answer: Any, layout: Layout) -> Any:
    """An answer without data, of twice as many rows."""
    if isinstance(answer, Blank):
        shape = answer.shape
        grown = shape and shape[0] % layout.rows == 0
        return Blank(torch.Size((2 * shape[0], *shape[1:])), answer.dtype, answer.device) if grown else answer
    if isinstance(answer, list) and layout.lists and len(answer) == layout.rows:
        return answer * 2
    if isinstance(answer, dict):
        return type(answer)(**{name: _doubled(item, layout) for name, item in answer.items()})
    if isinstance(answer, list | tuple):
        return type(answer)(_doubled(item, layout) for item in answer)
    return answer


def _mark_timesteps(sampler: Runner, probe: Probe) -> None:
    """A timestep without dimension is a row where the model spreads it over its batch itself."""
    for forward in probe.forwards:
        model = sampler.component(forward.name)
        if type(getattr(model, "_orig_mod", model)).__name__ not in SPREADS_TIMESTEP:
            continue
        for path in ("timestep", 1):
            leaf = forward.ask.tree.get(path)
            if isinstance(leaf, Blank) and not leaf.shape:
                for layouts in (layouts for (known, _), layouts in probe.guesses.items() if known == forward.ask.form):
                    for layout in layouts:
                        layout.marks[path,] = Scalar()


@contextmanager
def _not_counting(device: torch.device) -> Iterator[Callable[[], float]]:
    yield lambda: 0.0


__all__ = ["first_calls"]
