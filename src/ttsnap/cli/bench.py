"""`ttsnap bench`: what kinds of looks are worth on a model of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ttsnap.cli.options import SEARCH, AsJson, ModelOptions, PictureOptions, read_calls, read_prompts, read_range
from ttsnap.core import MAX_CANDIDATES
from ttsnap.files.pictures import Pictures
from ttsnap.live.settings import MAX_SEED, ModelSettings, check_ranges

if TYPE_CHECKING:
    from ttsnap.live.looks import Looked

What = Parameter(group=SEARCH)


def bench(
    *prompt: str,
    prompts: Annotated[str | None, What] = None,
    prompt_column: Annotated[str | None, What] = None,
    prompt_range: Annotated[str | None, What] = None,
    reward: Annotated[str | None, What] = None,
    looks: Annotated[str | None, What] = None,
    candidates: Annotated[int, What] = 16,
    calls: Annotated[str | None, What] = None,
    seed: Annotated[int, What] = 0,
    model: ModelOptions = ModelSettings(),
    pictures: PictureOptions = Pictures(),
    json: AsJson = False,
) -> None:
    """Measure which early look is worth its cost: the agreement of its ranking with that of the finished images.

    Try: ttsnap bench --prompts shapes:held-out --prompt-range 0:10

    Args:
        prompt: Prompts.
        prompts: File with prompts (.txt, one per line, .csv, .tsv, .json or .jsonl), or shapes:held-out.
        prompt_column: Column of the table or JSON with the prompts, by name or number.
        prompt_range: Part of the prompts, such as 0:20.
        reward: Reward that judges (default: the model's own); a noise-aware one is measured as it serves, too.
        looks: Kinds of looks, such as full,tiny,small=128,linear (default: all that this model has).
        candidates: Of each prompt.
        calls: Calls to look after, such as 2,4,8 (default: eight of the first three fifths).
        seed: First seed.
    """
    import json as encoder
    from dataclasses import asdict

    from ttsnap import rewards
    from ttsnap.cli.progress import ImageProgress
    from ttsnap.cli.workers import quietly
    from ttsnap.live.judging import try_own
    from ttsnap.live.looks import compare_looks
    from ttsnap.live.session import reward_of

    check_ranges(candidates=(candidates, 2, MAX_CANDIDATES), seed=(seed, 0, MAX_SEED))
    texts = read_prompts(prompt, prompts, verb="bench", column=prompt_column, wildcards=True)
    texts = [texts[p] for p in read_range(prompt_range, len(texts))]
    name = str(reward_of(model.model, reward, pushed=model.diversity is not None))
    if len(rewards.names_of(name)) != 1:
        raise ValueError(f"looks of one reward are compared at a time, got {name}")
    try_own(name, texts[0], None)
    sampler = quietly(model.sampler, texts[0], pictures)
    (judge,) = model.load_rewards(name, sampler.device).values()
    with ImageProgress("looking", silent=json, unit="candidates") as progress:
        found = compare_looks(
            sampler,
            name,
            judge,
            texts,
            kinds=None if looks is None else [kind.strip() for kind in looks.split(",")],
            candidates=candidates,
            calls=read_calls(calls),
            seed=seed,
            on_start=progress.start,
            on_images=progress.advance,
        )
    if json:
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
