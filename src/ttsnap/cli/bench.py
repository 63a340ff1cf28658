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
from ttsnap.live import protocols
from ttsnap.live.comparison import Comparison, ComparisonSettings
from ttsnap.live.protocols import Protocol
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
    protocol: Annotated[str | None, What] = None,
    compared: ComparisonOptions = ComparisonSettings(),
    budget: Annotated[tuple[str, ...], Budgets] = (),
    looks: Annotated[str | None, What] = None,
    speed: Annotated[bool, Parameter(group=SEARCH, negative="")] = False,
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

    --protocol: a published comparison (ttsnap, psp, psp-sd3.5, dog-trim, rbf), with the paper's figures beside ours;
    each option that is given goes before what it says.

    --speed: seconds, batch places used, what is added to the bare calls, and memory, of --policies (default: that of
    generate) with --candidates, against the stock pipeline's best-of-N for as many calls in the same run; in --draws
    turns.

    Without these: the agreement of each kind of look's ranking with that of the finished images, and its cost.

    Args:
        prompt: Prompts.
        prompts: File with prompts (.txt, one per line, .csv, .tsv, .json or .jsonl), shapes:held-out, or geneval.
        prompt_column: Column of the table or JSON with the prompts, by name or number.
        prompt_range: Part of the prompts, such as 0:20.
        protocol: A published comparison: model, prompts, policies, rewards and cost.
        budget: With --policies: what a prompt may cost, such as 18GFLOP or 80NFE, or 9:36:9GFLOP; may be repeated.
        looks: Kinds of looks, such as full,tiny,small=128,linear (default: all that this model has).
        speed: Measure where the time goes, on the first prompt.
        candidates: Of each prompt, to look at; with --speed those that a search starts.
        calls: Calls to look after, such as 2,4,8 (default: eight of the first three fifths).
        out: With --policies: folder for measurements, bench.json, bench.md and bench.png (default: bench).
        compare: Two of these folders, to set them side by side.
    """
    if compare is not None:
        from ttsnap.live.leaderboard import compare as side_by_side

        print("\n".join(side_by_side(*compare)))
        return
    published = protocols.named(protocol) if protocol is not None else None
    if published is not None:
        model, compared = protocols.filled(model, published.model), protocols.filled(compared, published.compared)
        budget = budget or published.budgets(model.steps)
        prompts = prompts or (None if prompt else published.prompts)
        if prompts is None and not prompt:
            raise ValueError(f"protocol {protocol} needs --prompts: {published.note}")
    texts = read_prompts(prompt, prompts, verb="bench", column=prompt_column, wildcards=True)
    part = read_range(prompt_range, len(texts))
    if speed:
        if budget or looks is not None or calls is not None or out is not None or dry_run:
            raise ValueError(
                "--speed takes no --budget, --looks, --calls, --out or --dry-run; it measures searches of --candidates"
            )
        _speed(model, pictures, compared, texts[part.start], candidates, json)
        return
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
        _policies(comparison, workers, published, json)
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
    plain, searches = comparison.plain(), asked.contenders()
    times = len(comparison.prompts) * asked.draws
    what = f"{times} prompts: {asked.pool} candidates finished in {len(plain)} ways for best-of-N; {len(searches)} "
    what += f"searches at each of {len(comparison.budgets)} budgets"
    pool = sampled(what, sampler, judges, prompt, times * len(plain), asked.pool, [sampler.num_steps], 0)
    spent = times * len(searches) * sum(budget.amount for budget in comparison.budgets)
    more = 1 + spent / (pool.calls if comparison.unit == "NFE" else pool.tflop)
    amounts = (round(pool.calls * more), round(pool.looks * more), pool.tflop * more, pool.seconds * more)
    return Work(what, *amounts, pool.weights, 2000 * len(comparison.parts()))


def _policies(comparison: Comparison, workers: Workers, protocol: Protocol | None, silent: bool) -> None:
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
    file = leaderboard.save(comparison, found, shlex.join(["ttsnap", *sys.argv[1:]]), protocol)
    data = leaderboard.read(file)
    if silent:
        print(encoder.dumps(data, indent=1))
        return
    print("\n".join(leaderboard.table(found)))
    if protocol is not None:
        print("\n".join(["", *leaderboard.printed(data)]))
    for why in data["left_out"]:
        print(f"left out: {why}")
    print(f"written: {file.with_suffix('.md')}, {file.with_suffix('.png')}, {file}")


def _speed(
    model: ModelSettings,
    pictures: Pictures,
    compared: ComparisonSettings,
    prompt: str,
    candidates: int,
    silent: bool,
) -> None:
    """Measure where the time goes, and show it."""
    import shlex
    import sys
    from dataclasses import asdict

    from ttsnap import policies
    from ttsnap.cli.progress import ImageProgress
    from ttsnap.cli.workers import quietly
    from ttsnap.files.provenance import versions
    from ttsnap.live import speed as measuring
    from ttsnap.live.comparison import DEFAULT
    from ttsnap.live.leaderboard import hardware
    from ttsnap.live.session import prepare

    check_ranges(candidates=(candidates, 1, MAX_CANDIDATES))
    if len(compared.reward) > 1 or compared.previews or any(who.steps for who in compared.contenders()):
        raise ValueError("--speed measures policies with one reward, one preview and one number of steps")
    reward = compared.reward[0] if compared.reward else None
    given = model.keywords(pictures) | {"reward": reward, "report": "none", "prompt": prompt}
    session = quietly(lambda: prepare(model.model, reward_device=model.reward_device, **given))
    steps, turns = session.sampler.num_steps, compared.draws if compared.draws > 1 else 5
    names = [who.policy for who in compared.contenders()] or [DEFAULT]
    searches = {
        name: session.policy if name == DEFAULT else policies.read(name)[0] or policies.default_policy(steps)
        for name in names
    }
    with ImageProgress("measuring", silent=silent, unit="turns") as progress:
        progress.start(turns + 1)
        found = measuring.measure(session, searches, prompt, candidates, turns, on_turn=lambda: progress.advance(1))
    where = hardware(model.device)
    if silent:
        told = {"command": shlex.join(["ttsnap", *sys.argv[1:]]), "hardware": where, "versions": versions()}
        print(encoder.dumps(told | {"speed": [asdict(one) for one in found]}, indent=1))
        return
    print("\n".join(measuring.table(found)))
    s = session.sampler
    print(
        f"{model.model}, {s.width} x {s.height}, {steps} steps, batches of {s.max_batch}, one prompt, medians of "
        f"{turns} turns, {where}; seconds are those of {'computing' if s.device.type == 'cpu' else 'the wall'}"
    )


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
