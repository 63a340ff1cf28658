"""The tab that opens a recording or a past run."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ttsnap import policies
from ttsnap.app import view
from ttsnap.app.job import sentence
from ttsnap.app.searches import Searches
from ttsnap.core.cost import format_amount
from ttsnap.core.observers import Seen
from ttsnap.files import figures

if TYPE_CHECKING:
    from ttsnap.core.grid import Policy
    from ttsnap.recordings import Recording
    from ttsnap.replay import Simulation

QUIET: dict[str, Any] = {"show_progress": "minimal", "api_visibility": "private", "concurrency_limit": 2}
TUNE_SECONDS, TUNE_TRIALS, TRIALS = 20.0, 200, 20
SKELETON = '<div class="tt-skeleton" role="status" aria-label="loading"></div>'
NOTHING = (
    '<p class="tt-hint">Nothing to open yet. Runs of this page appear here, and so does what lies in the output '
    "folder: recordings of <code>ttsnap record</code> and <code>import-values</code>, runs of "
    "<code>ttsnap generate</code>.</p>"
)


def found(searches: Searches, visitor: str | None) -> dict[str, Path]:
    """What a visitor may open: his own runs, and what was put into the output folder."""
    items: dict[str, Path] = {}
    for path in sorted(searches.out.glob("*.zarr")):
        items[f"recording {path.stem}"] = path
    try:
        mine = sorted(searches.home(visitor).glob("*/result.json"), reverse=True)
    except ValueError:
        mine = []
    for path in mine:
        items[f"my run {path.parent.name}"] = path.parent
    for path in sorted([*searches.out.glob("*/result.json"), *searches.out.glob("*/p[0-9]*/result.json")]):
        items[f"run {path.parent.relative_to(searches.out)}"] = path.parent
    return items


def history_svg(looks: Mapping[int, Sequence[Seen]], num_steps: int, reward: str) -> str:
    """Reward of each candidate against calls, as a picture for the page."""
    figure = figures.svg(figures.history(looks, num_steps, reward))
    label = f"Reward of {len(looks)} candidates against denoiser calls"
    return f'<div role="img" aria-label="{label}">{figure}</div>'


def show_run(folder: Path) -> str:
    """A past run: its facts, its history and its board."""
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    looks = {
        int(one["seed"]): [
            Seen(int(s["step"]), float(s["reward"]), bool(s["kept"]), draft=bool(s.get("draft"))) for s in one["looks"]
        ]
        for one in record["history"]
    }
    reward = "stopped before an image was finished" if record["reward"] is None else f"reward {record['reward']:.3f}"
    counts = record["candidates"]
    facts = (
        f"{record['policy']['policy']} · {reward} · {counts['finished']} of {counts['started']} finished · "
        f"{record['cost']['nfe']} NFE, {format_amount(record['cost']['tflop'], 'TFLOP')}"
    )
    html = f"<h3>“{escape(record['prompt'])}”</h3>" + view.status(facts)
    if looks:
        html += history_svg(looks, int(record["num_steps"]), " + ".join(record["rewards"]))
    if (board := folder / "board.png").is_file():
        data = base64.b64encode(board.read_bytes()).decode()
        html += f'<img src="data:image/png;base64,{data}" alt="The pruning board of this run" style="max-width:100%">'
    return html


@lru_cache(maxsize=8)
def _opened(path: str, changed: float) -> Recording:
    from ttsnap.recordings import Recording

    return Recording.open(path)


def opened(path: Path) -> Recording:
    """A recording, checked; kept open."""
    return _opened(str(path), path.stat().st_mtime)


@lru_cache(maxsize=16)
def _simulated(recording: Recording, tuned: str) -> Simulation:
    from ttsnap.replay import Contender, EveryCall, cost_model_of, default_budgets, simulate

    num_steps = recording.shape[2]
    model = cost_model_of(recording, None)
    guides = ("aware", "clean") if recording.has_aware else ("clean",)
    published = policies.default_policy(num_steps)
    field = [Contender({"aware": "TTSnap", "clean": "TTSp"}[guide], published, guide) for guide in guides]
    for budget, made in json.loads(tuned).items():
        field.append(Contender(f"tuned at {budget}", policies.from_dict(made), guides[0]))
    return simulate(recording, field, default_budgets(model, num_steps), EveryCall(model), trials=TRIALS)


def contenders(recording: Recording, tuned: dict[str, Any]) -> dict[str, Policy]:
    """Policies by name that can be replayed on a prompt."""
    own = {name: policies.from_dict(made) for name, made in ((f"tuned at {b}", p) for b, p in tuned.items())}
    return own | {"halving": policies.default_policy(recording.shape[2]), "best-of-N": policies.BestOfN()}


def curves(recording: Recording, tuned: dict[str, Any], place: int) -> str:
    """Reward against budget of every policy, and the figures at the budget of that place."""
    from ttsnap.replay import plots

    simulation = _simulated(recording, json.dumps(tuned, sort_keys=True))
    budgets = simulation.dataset.budget.values
    budget = float(budgets[min(place, len(budgets) - 1)])
    rows = [row for row in simulation.rows[0] if row["budget"] == budget]
    lines = []
    for row in rows:
        gain = times = ""
        if row["gain"] is not None:
            gain = f"{row['gain']:+.3f} ({row['gain_ci95'][0]:+.3f} to {row['gain_ci95'][1]:+.3f})"
        if row["compute_multiplier"] is not None:
            times = f"{row['compute_multiplier']:.2f} times"
        value = "more than recorded" if row["reward"] is None else f"{row['reward']:.3f}"
        lines.append((row["policy"], row["candidates"], value, gain, times))
    first = rows[0]
    if first["best_of_n_reward"] is not None:
        lines.append(("best-of-N", first["best_of_n_candidates"], f"{first['best_of_n_reward']:.3f}", "", ""))
    head = ("policy", "started", "reward", "gain over best-of-N (95 %)", "worth")
    unit = simulation.dataset.attrs["unit"]
    return (
        f'<div role="img" aria-label="Reward against budget">{figures.svg(plots.reward(simulation, budget))}</div>'
        f"<h4>At {format_amount(budget, unit)} per prompt</h4>{_table(head, lines)}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    table = f'<table class="tt-rungs"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="tt-table">{table}</div>'


def one_prompt(recording: Recording, prompt: int, name: str, tuned: dict[str, Any], place: int) -> str:
    """The candidates of one prompt under a policy at a budget."""
    from ttsnap.replay import EveryCall, cost_model_of, default_budgets, replay_prompt

    pool, num_steps = recording.shape[1:3]
    model = cost_model_of(recording, None)
    budget = default_budgets(model, num_steps)[place]
    policy = contenders(recording, tuned)[name]
    count = min(pool, EveryCall(model).candidates(policy, budget, num_steps))
    guide = "aware" if recording.has_aware else "clean"
    replayed = replay_prompt(recording, prompt, policy, count, guide=guide)
    result = replayed.result
    facts = (
        f"{name} · {count} started, {int(result.finished.sum())} finished · "
        f"{int(result.ledger.nfe[0])} NFE of {format_amount(budget.amount, budget.unit)} · "
        f"chosen: seed {int(replayed.seeds[result.chosen[0]])}, "
        + ", ".join(f"{r} {v:.3f}" for r, v in zip(recording.rewards, result.rewards[0], strict=True))
    )
    return view.status(facts) + history_svg(replayed.history, num_steps, " + ".join(recording.rewards))


def tune_for(
    recording: Recording, place: int, proceed: Callable[[], bool] = lambda: True
) -> tuple[str, dict[str, Any], str]:
    """The schedule fitted for the budget of that place: the budget, the policy as JSON, and what it is worth.

    Args:
        recording: that it is fitted on.
        place: of the budget.
        proceed: asked after each schedule that was tried; where it says no, the best so far is taken.
    """
    from ttsnap.replay import EveryCall, cost_model_of, default_budgets, tune

    model = cost_model_of(recording, None)
    budget = default_budgets(model, recording.shape[2])[place]
    guide = "aware" if recording.has_aware else "clean"
    folds = max(2, min(4, len(recording.recorded()) // 2))
    tuning = tune(
        recording,
        [budget],
        EveryCall(model),
        guide=guide,
        folds=folds,
        trials=TUNE_TRIALS,
        seconds=TUNE_SECONDS,
        on_progress=lambda tried, trials, best: proceed(),
    )
    return str(budget), policies.to_dict(tuning.policy), tuning.sentence


def describe(made: dict[str, Any]) -> str:
    """A policy in words: `halving, rungs 7, 19, keep 0.3, 0.27`."""
    parts = [f"{key} {', '.join(f'{v:g}' for v in made[key])}" for key in ("rungs", "keep", "sizes") if key in made]
    return ", ".join([made["policy"], *parts])


def build(searches: Searches, visitor: gr.BrowserState, tab: gr.Tab) -> None:
    """The tab."""
    with gr.Row():
        item = gr.Dropdown([], label="A recording or a past run", elem_id="tt-explore-item", scale=4)
    said = gr.HTML(NOTHING, elem_id="tt-explore-said")
    run = gr.HTML(elem_id="tt-explore-run", elem_classes="tt-figure")
    tuned = gr.State({})
    with gr.Column(visible=False) as controls:
        budget = gr.Slider(1, 10, value=5, step=1, label="Budget: best-of-2, -4, … -20", elem_id="tt-explore-budget")
        chart = gr.HTML(elem_id="tt-explore-chart", elem_classes="tt-figure")
        with gr.Row():
            fit = gr.Button("Tune a schedule for this budget", elem_id="tt-explore-tune")
            halt = gr.Button("Stop tuning", variant="stop", interactive=False, elem_id="tt-explore-stop")
        schedule = gr.HTML(elem_id="tt-explore-schedule")
        gr.Markdown("### One prompt")
        with gr.Row():
            prompt = gr.Dropdown([], label="Prompt", scale=3)
            policy = gr.Dropdown([], label="Policy", scale=1, min_width=160)
        single = gr.HTML(elem_id="tt-explore-prompt", elem_classes="tt-figure")
    every = [said, run, controls, chart, schedule, prompt, policy, single, tuned]

    def choices(visitor: str | None, chosen: str | None) -> dict[Any, Any]:
        items = list(found(searches, visitor))
        keep = chosen if chosen in items else None
        return {item: gr.update(choices=items, value=keep), said: "" if items else NOTHING}

    def path_of(visitor: str | None, name: str | None) -> Path:
        items = found(searches, visitor)
        if name not in items:
            raise ValueError("that is not among what can be opened here")
        return items[name]

    def pick(visitor: str | None, name: str | None) -> Iterator[dict[Any, Any]]:
        empty = {run: "", controls: gr.update(visible=False), said: "", schedule: "", tuned: {}}
        yield empty | {run: SKELETON if name else ""}
        if not name:
            return
        try:
            path = path_of(visitor, name)
            if path.suffix != ".zarr":
                yield empty | {run: show_run(path)}
                return
            recording = opened(path)
            names = [(recording.prompts[p], int(p)) for p in recording.recorded()]
            known = list(contenders(recording, {}))
            yield empty | {
                controls: gr.update(visible=True),
                chart: curves(recording, {}, 4),
                prompt: gr.update(choices=names, value=names[0][1]),
                policy: gr.update(choices=known, value=known[0]),
                single: one_prompt(recording, names[0][1], known[0], {}, 4),
                budget: 5,
            }
        except Exception as error:
            yield empty | {said: view.error(sentence(error))}

    def move(visitor: str | None, name: str, made: Any, place: float, who: int, what: str) -> dict[Any, Any]:
        try:
            recording = opened(path_of(visitor, name))
            at = min(max(int(place), 1), 10) - 1
            return {
                chart: curves(recording, made, at),
                single: one_prompt(recording, int(who), what, made, at),
                said: "",
            }
        except Exception as error:
            return {said: view.error(sentence(error))}

    stopped: dict[str, threading.Event] = {}  # of visitors who tune

    def fitted(visitor: str | None, name: str, made: Any, place: float, who: int) -> Iterator[dict[Any, Any]]:
        stop = stopped[str(visitor)] = threading.Event()
        working = {fit: gr.update(interactive=False), halt: gr.update(interactive=True)}
        ready = {fit: gr.update(interactive=True), halt: gr.update(interactive=False)}
        yield {schedule: SKELETON, **working}
        try:
            recording = opened(path_of(visitor, name))
            at = min(max(int(place), 1), 10) - 1
            amount, best, words = tune_for(recording, at, lambda: not stop.is_set())
            made = {**made, amount: best}
            known = contenders(recording, made)
            early = "Stopped early; the best so far, tuned" if stop.is_set() else "Tuned"
            yield {
                **ready,
                tuned: made,
                schedule: view.status(f"{early} for {amount}: {describe(best)}. {words}."),
                policy: gr.update(choices=list(known), value=f"tuned at {amount}"),
                chart: curves(recording, made, at),
                single: one_prompt(recording, int(who), f"tuned at {amount}", made, at),
                said: "",
            }
        except Exception as error:
            yield {said: view.error(sentence(error)), schedule: "", **ready}
        finally:
            if stopped.get(str(visitor)) is stop:
                del stopped[str(visitor)]

    def stop_tuning(visitor: str | None) -> None:
        if (stop := stopped.get(str(visitor))) is not None:
            stop.set()

    tab.select(choices, [visitor, item], [item, said], **QUIET)
    item.input(pick, [visitor, item], [*every, budget], **QUIET)
    moved = [visitor, item, tuned, budget, prompt, policy]
    gr.on(
        [budget.change, prompt.input, policy.input],
        move,
        moved,
        [chart, single, said],
        trigger_mode="always_last",
        **QUIET,
    )
    shown = [fit, halt, tuned, schedule, policy, chart, single, said]
    fit.click(fitted, [visitor, item, tuned, budget, prompt], shown, **QUIET)
    halt.click(stop_tuning, visitor, **{**QUIET, "concurrency_limit": None})
