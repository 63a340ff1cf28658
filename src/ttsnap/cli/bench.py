"""`ttsnap bench`: what policies, and kinds of looks, are worth on a model of one's own."""

from __future__ import annotations

import json as encoder
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ttsnap.cli.options import (
    OUTPUT,
    SEARCH,
    AsJson,
    Budgets,
    DryRun,
    ModelOptions,
    PictureOptions,
    WorkerOptions,
    Workers,
    read_calls,
    read_prompts,
    read_range,
    tell,
)
from ttsnap.core import MAX_CANDIDATES
from ttsnap.live.comparison import Comparison, ComparisonSettings
from ttsnap.live.settings import ModelSettings, check_ranges
from ttsnap.pipelines.conditions import Pictures

if TYPE_CHECKING:
    from ttsnap.live.forecast import Work
    from ttsnap.live.looks import Looked

What = Parameter(group=SEARCH)
ComparisonOptions = Annotated[ComparisonSettings, Parameter(name="*", group=SEARCH)]


def bench(
    *prompt: str,
    prompts: Annotated[str | None, What] = None,
    prompt_column: Annotated[str | None, What] = None,
    prompt_range: Annotated[str | None, What] = None,
    compared: ComparisonOptions = ComparisonSettings(),
    budget: Annotated[tuple[str, ...], Budgets] = (),
    looks: Annotated[str | None, What] = None,
    candidates: Annotated[int, What] = 16,
    calls: Annotated[str | None, What] = None,
    model: ModelOptions = ModelSettings(),
    pictures: PictureOptions = Pictures(),
    workers: WorkerOptions = Workers(),
    out: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    compare: Annotated[tuple[Path, Path] | None, Parameter(group=OUTPUT)] = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Compare policies at equal cost on a model of one's own, or measure which early look is worth its cost.

    Try: ttsnap bench --policies halving,svdd --budget 5GFLOP --prompts shapes:held-out --prompt-range 0:20 --out bench

    Every call, decode and look is counted, all search with the same candidates, and best-of-N is measured up to --pool
    candidates. What is measured is kept in --out: the same command goes on, another one adds to it.

    Without --policies: the agreement of each kind of look's ranking with that of the finished images, and its cost.

    Args:
        prompt: Prompts.
        prompts: File with prompts (.txt, one per line, .csv, .tsv, .json or .jsonl), or shapes:held-out.
        prompt_column: Column of the table or JSON with the prompts, by name or number.
        prompt_range: Part of the prompts, such as 0:20.
        budget: With --policies: what a prompt may cost, such as 18GFLOP or 80NFE, or 9:36:9GFLOP; may be repeated.
        looks: Kinds of looks, such as full,tiny,small=128,linear (default: all that this model has).
        candidates: Of each prompt, to look at.
        calls: Calls to look after, such as 2,4,8 (default: eight of the first three fifths).
        out: With --policies: folder for measurements, bench.json, bench.md and bench.png (default: bench).
        compare: Two of these folders, to set them side by side.
    """
    if compare is not None:
        from ttsnap.live.leaderboard import compare as side_by_side

        print("\n".join(side_by_side(*compare)))
        return
    texts = read_prompts(prompt, prompts, verb="bench", column=prompt_column, wildcards=True)
    part = read_range(prompt_range, len(texts))
    if compared.policies is not None:
        if looks is not None or calls is not None:
            raise ValueError("--looks and --calls compare looks, --policies compares searches; give one of them")
        folder = Path("bench") if out is None else out
        comparison = Comparison.of(
            model, pictures, compared, budget, [texts[p] for p in part], part.start, folder.absolute()
        )
        if dry_run:
            tell(_planned(comparison), json)
            return
        _policies(comparison, workers, json)
        return
    if budget or out is not None:
        raise ValueError("--budget and --out compare searches; say which with --policies, such as halving,svdd")
    _looks(model, pictures, compared, [texts[p] for p in part], looks, candidates, calls, dry_run, json)


def _planned(comparison: Comparison) -> Work:
    """What would be measured: all that best-of-N needs, and searches that spend their whole budgets."""
    from ttsnap.cli.workers import quietly
    from ttsnap.live.forecast import Work, sampled
    from ttsnap.live.session import reward_of

    asked, model, prompt = comparison.settings, comparison.model, comparison.prompts[0]
    sampler = quietly(model.sampler, prompt, comparison.pictures)
    named = ",".join(asked.reward) if asked.reward else None
    judges = model.load_rewards(str(reward_of(model.model, named)), sampler.device)
    plain, searches = asked.plain(), asked.contenders()
    times = len(comparison.prompts) * asked.draws
    what = f"{times} prompts: {asked.pool} candidates finished in {len(plain)} ways for best-of-N; {len(searches)} "
    what += f"searches at each of {len(comparison.budgets)} budgets"
    pool = sampled(what, sampler, judges, prompt, times * len(plain), asked.pool, [sampler.num_steps], 0)
    spent = times * len(searches) * sum(budget.amount for budget in comparison.budgets)
    more = 1 + spent / (pool.calls if comparison.unit == "NFE" else pool.tflop)
    amounts = (round(pool.calls * more), round(pool.looks * more), pool.tflop * more, pool.seconds * more)
    return Work(what, *amounts, pool.weights, 2000 * len(comparison.parts()))


def _policies(comparison: Comparison, workers: Workers, silent: bool) -> None:
    """Measure what is left, and show the table."""
    import shlex
    import sys

    from ttsnap.cli.progress import Board
    from ttsnap.cli.workers import PARTLY, quietly, report_failures, run
    from ttsnap.cluster.compare import Compare
    from ttsnap.live import leaderboard
    from ttsnap.live.judging import try_own

    workers.check_device(comparison.model.device, comparison.model.reward_device)
    for reward in comparison.settings.reward:
        try_own(reward, comparison.prompts[0], None)
    folder = comparison.folder
    folder.mkdir(parents=True, exist_ok=True)
    parts = comparison.parts()
    show = Board("comparing", "parts", silent=silent, workers=not workers.alone)
    outcome = quietly(run, Compare(comparison), workers, folder, show)
    failures = report_failures(outcome, folder / "failures.json", lambda number: parts[number].contender.policy)
    if failures:
        raise SystemExit(PARTLY)
    found = leaderboard.rows(comparison)
    file = leaderboard.save(comparison, found, shlex.join(["ttsnap", *sys.argv[1:]]))
    data = leaderboard.read(file)
    if silent:
        print(encoder.dumps(data, indent=1))
        return
    print("\n".join(leaderboard.table(found)))
    for why in data["left_out"]:
        print(f"left out: {why}")
    print(f"written: {file.with_suffix('.md')}, {file.with_suffix('.png')}, {file}")


def _looks(
    model: ModelSettings,
    pictures: Pictures,
    compared: ComparisonSettings,
    texts: list[str],
    looks: str | None,
    candidates: int,
    calls: str | None,
    dry_run: bool,
    silent: bool,
) -> None:
    """Measure what each kind of look is worth, and show it."""
    from dataclasses import asdict

    from ttsnap import rewards
    from ttsnap.cli.progress import ImageProgress
    from ttsnap.cli.workers import quietly
    from ttsnap.live.judging import try_own
    from ttsnap.live.looks import compare_looks
    from ttsnap.live.session import reward_of

    check_ranges(candidates=(candidates, 2, MAX_CANDIDATES))
    if len(compared.reward) > 1:
        raise ValueError(f"looks of one reward are compared at a time, got {', '.join(compared.reward)}")
    asked = compared.reward[0] if compared.reward else None
    name = str(reward_of(model.model, asked, pushed=model.diversity is not None))
    if len(rewards.names_of(name)) != 1:
        raise ValueError(f"looks of one reward are compared at a time, got {name}")
    try_own(name, texts[0], None, model.reward_timeout)
    sampler = quietly(model.sampler, texts[0], pictures)
    (judge,) = model.load_rewards(name, sampler.device).values()
    if dry_run:
        from ttsnap.core.grid import early_calls
        from ttsnap.live.forecast import sampled
        from ttsnap.live.looks import KINDS

        after, ways = read_calls(calls) or early_calls(sampler.num_steps), looks.split(",") if looks else KINDS
        what = f"{len(texts)} prompts x {candidates} candidates, looked at in up to {len(ways)} ways"
        plan = (what, sampler, {name: judge}, texts[0], len(texts), candidates, after, 0, len(ways))
        tell(sampled(*plan), silent)
        return
    with ImageProgress("looking", silent=silent, unit="candidates") as progress:
        found = compare_looks(
            sampler,
            name,
            judge,
            texts,
            kinds=None if looks is None else [kind.strip() for kind in looks.split(",")],
            candidates=candidates,
            calls=read_calls(calls),
            seed=compared.seed,
            on_start=progress.start,
            on_images=progress.advance,
        )
    if silent:
        print(encoder.dumps({"reward": name, "looks": [asdict(look) for look in found]}, indent=1))
        return
    _show(found, name, len(texts), candidates)


def _show(found: list[Looked], name: str, prompts: int, candidates: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from ttsnap.core.cost import format_amount

    kinds = list(dict.fromkeys(look.kind for look in found))
    costs = Table("look", "cost", "in calls", "ms", "tau with full", box=None, pad_edge=False)
    ranks = Table("call", "noise", *kinds, box=None, pad_edge=False)
    for kind in kinds:
        mine = [look for look in found if look.kind == kind]
        first, agreed = mine[0], [look.full for look in mine if look.full is not None]
        times = f"{sum(look.seconds for look in mine) / len(mine) * 1e3:.3g}"
        shown = f"{min(agreed):.2f} to {max(agreed):.2f}" if kind != "full" and agreed else ""
        calls = "-" if first.calls is None else f"{first.calls:.2f}"
        costs.add_row(kind, format_amount(first.tflop, "TFLOP"), calls, times, shown)
    for call in sorted({look.call for look in found}):
        row = [look for look in found if look.call == call]
        ranks.add_row(str(call), f"{row[0].sigma:.3g}", *map(_tau, row))
    console = Console()
    console.print(costs)
    console.print()
    console.print(ranks)
    print(
        f"Kendall tau of {name} after each call with that of the finished images, within {prompts} prompts x "
        f"{candidates} candidates; 95 % intervals over prompts"
    )


def _tau(look: Looked) -> str:
    if look.final is None:
        return "-"
    return f"{look.final:.2f}" + ("" if look.error is None else f"±{1.96 * look.error:.2f}")
