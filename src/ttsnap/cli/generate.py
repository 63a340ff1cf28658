"""`ttsnap generate`: from prompts and a budget to the best images, with a pruning board and a record."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ttsnap.cli import from_picture
from ttsnap.cli.options import (
    OUTPUT,
    SEARCH,
    AsJson,
    DryRun,
    ModelOptions,
    PictureOptions,
    SearchOptions,
    WorkerOptions,
    Workers,
    read_calls,
    read_prompts,
)
from ttsnap.live.settings import ModelSettings, SearchSettings, changes, pictures_key, resume_key
from ttsnap.pipelines.conditions import Pictures

if TYPE_CHECKING:
    from ttsnap.cluster.generate import Generate
    from ttsnap.files.storage import AnyPath
    from ttsnap.live.session import Session


def generate(
    *prompt: str,
    prompts: Annotated[str | None, Parameter(group=SEARCH)] = None,
    prompt_column: Annotated[str | None, Parameter(group=SEARCH)] = None,
    source: Annotated[Path | None, Parameter(name="--from", group=SEARCH)] = None,
    search: SearchOptions = SearchSettings(),
    model: ModelOptions = ModelSettings(),
    pictures: PictureOptions = Pictures(),
    out: Annotated[str | None, Parameter(group=OUTPUT)] = None,
    top: Annotated[int, Parameter(group=OUTPUT)] = 1,
    compare: Annotated[bool, Parameter(group=OUTPUT)] = False,
    compare_steps: Annotated[str | None, Parameter(group=OUTPUT)] = None,
    board: Annotated[bool, Parameter(group=OUTPUT, negative="--no-board")] = True,
    metadata: Annotated[bool, Parameter(group=OUTPUT, negative="--no-metadata")] = True,
    dry_run: DryRun = False,
    workers: WorkerOptions = Workers(),
    json: AsJson = False,
) -> None:
    """Find the best image for a prompt under a compute budget.

    Try: ttsnap generate "a red circle left of a blue square"

    Args:
        prompt: What to paint; several prompts give several images; {red|blue} stands for one with each.
        prompts: File with prompts: .txt (one per line), .csv, .tsv, .json or .jsonl (with a column prompt).
        prompt_column: Column of the table or JSON with the prompts, by name or number.
        source: Picture that ttsnap made: its prompt and its settings, where no others are given.
        out: Output folder, local or such as s3://bucket/x (default: out/ and the prompt).
        top: Save this many of the best finished images.
        compare: Also run best-of-N at the same cost and show it, with as many steps, with the model's own number, and
            with that at which best-of-N is best, where these are known.
        compare_steps: The same with other numbers of steps, such as 8,12.
        board: Draw the pruning board.
        metadata: Let the pictures say how they were made, for `--from`, `ttsnap show` and other programs.
    """
    from ttsnap.cli.workers import quietly
    from ttsnap.cluster.generate import Generate, read_record
    from ttsnap.files.storage import location

    # Everything that can be wrong without a model is said before one is loaded.
    place = 0
    if source is not None:
        made = from_picture.recipe(source, model, pictures)
        place = made.get("place", 0)
        prompt = prompt or (() if prompts else (made["prompt"],))
    texts = read_prompts(prompt, prompts, column=prompt_column, wildcards=True)
    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    if search.different and top < 2:
        raise ValueError("--different needs --top 2 or more: how many images")
    workers.check_device(model.device, model.reward_device)
    if len(texts) == 1 and not workers.alone:
        raise ValueError("--workers and --ray-address are for many prompts; one prompt runs in one process")
    if dry_run:
        _say_only(quietly(search.prepare, model, texts[0], pictures, None, top), texts, top, board, json)
        return
    asked = {"prompts": texts}, model.key(), pictures_key(pictures), search.key()
    tried: bool | tuple[int, ...] = (
        tuple(read_calls(compare_steps, "--compare-steps") or ()) if compare_steps else compare
    )
    output = {"top": top, "compare": tried, "board": board, "metadata": None if metadata else False}
    settings = resume_key(*asked, output, {"place": place or None})
    folder, fixed = open_directory(None if out is None else location(out, absolute=True), settings)
    prepare = partial(quietly, search.prepare, model, texts[0], pictures, fixed, top)
    job = Generate(prepare, texts, folder, settings, fixed, search.seed, top, tried, board, metadata, place)
    if len(texts) > 1:
        _many(job, workers, json)
        return
    resumed = read_record(folder) is not None
    if not resumed:
        _one(job, json)
    _report([read_record(folder)], [folder], folder, json, resumed=resumed)


def _say_only(session: Session, texts: list[str], top: int, board: bool, as_json: bool) -> None:
    """What would run."""
    import json

    from ttsnap.cli.options import tell
    from ttsnap.core.cost import format_amount
    from ttsnap.live.forecast import forecast

    found = forecast(session, texts, top=top, board=board)
    if as_json:
        print(json.dumps(found.to_dict(), allow_nan=False))
        return
    tell(found.work, as_json)
    if len(texts) > 1:
        cost = found.prompt
        print(f"each of {len(texts)} prompts: {cost.nfe} denoiser calls, {format_amount(cost.tflop, 'TFLOP')}")


def _one(job: Generate, as_json: bool) -> None:
    """Search for one prompt, with a display of its own."""
    import sys
    import warnings

    from ttsnap.cli.progress import Display, say
    from ttsnap.files.locks import locked

    show = Display(silent=as_json)
    try:
        with locked(job.out, say):
            show.status("loading the model")
            session = job.prepare()
            job.settle(session)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                results = session.block(
                    job.prompts,
                    seed=job.seed,
                    top=job.top,
                    compare=job.compare,
                    previews=job.board,
                    observer=show,
                    place=job.place,
                )
            for note in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
                say(f"warning: {note}")
            job.save(results[0], job.out, session)
    except KeyboardInterrupt:
        show.close()
        print(f"stopped: the same command begins again ({job.out})", file=sys.stderr)
        raise SystemExit(130) from None
    show.close()


def _many(job: Generate, workers: Workers, as_json: bool) -> None:
    """Search for many prompts, here or on many workers; a prompt that fails fails alone."""
    from ttsnap.cli.progress import Board, say
    from ttsnap.cli.workers import PARTLY, failures_file, report_failures, run
    from ttsnap.cluster.generate import read_record

    folders = [job.folder(p) for p in range(len(job.prompts))]
    records = [read_record(folder) for folder in folders]
    failures, resumed = [], None not in records
    if not resumed:
        show = Board("searching", "prompts", silent=as_json, workers=not workers.alone)
        outcome = run(job, workers, job.out, show)
        records = [read_record(folder) for folder in folders]
        failures = report_failures(outcome, failures_file(job.out, inside=True), lambda p: job.prompts[p])
        if not as_json:
            say(f"{len(outcome.stored)} prompts, {show.summary()}")
    done = [p for p, record in enumerate(records) if record is not None]
    _report(
        [records[p] for p in done], [folders[p] for p in done], job.out, as_json, resumed=resumed, failures=failures
    )
    if failures:
        raise SystemExit(PARTLY)


def open_directory(out: AnyPath | None, settings: dict[str, Any]) -> tuple[AnyPath, int | None]:
    """The output directory, and the number of candidates if a run with these settings has begun there.

    Raises:
        ValueError: the path is a file, not writable, or holds a run with other settings.
    """
    import re
    from pathlib import Path

    from ttsnap.files.storage import check_writable

    if out is None:
        slug = re.sub(r"[^a-z0-9]+", "-", settings["prompts"][0].lower()).strip("-")[:48].strip("-") or "image"
        name, number = Path("out").absolute() / slug, 1
        out = name
        while (before := _settings_in(out)) is not None and before["settings"] != settings:
            number += 1
            out = name.with_name(f"{slug}-{number}")
    check_writable(out)
    before = _settings_in(out)
    if before is None:
        return out, None
    if before["settings"] != settings:
        different = ", ".join(changes(before["settings"], settings))
        raise ValueError(f"{out} holds a run with other settings ({different} differ); give another --out")
    return out, int(before["candidates"])


def _settings_in(folder: AnyPath) -> dict[str, Any] | None:
    import json

    from ttsnap.cluster.generate import SETTINGS

    try:
        data = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and {"settings", "candidates"} <= set(data) else None


def _report(
    records: list[Any],
    folders: list[AnyPath],
    out: AnyPath,
    as_json: bool,
    resumed: bool,
    failures: list[dict[str, Any]] | None = None,
) -> None:
    """Print what was found."""
    import json

    from ttsnap.core.cost import Cost
    from ttsnap.live.result import cost_line

    for record, folder in zip(records, folders, strict=True):
        record["files"] = {
            kind: [str(folder / name) for name in names] if isinstance(names, list) else str(folder / names)
            for kind, names in record["files"].items()
        }
    if as_json:
        whole = records[0] if failures is None else {"results": records, "failures": failures}
        print(json.dumps(whole | {"out": str(out)}, indent=1, allow_nan=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if resumed:
        console.print(f"{out} is complete already; nothing was run again.", highlight=False, soft_wrap=True)
    table = Table(title=None, show_edge=False, pad_edge=False)
    for name in ("prompt", "reward", "seed", "best-of-N for the same cost", "image"):
        table.add_column(name, justify="right" if name in ("reward", "seed") else "left")
    for record in records[:20]:
        other = record["best_of_n_at_this_cost"]
        got = f"reward {other['reward']:.3f}" if other["reward"] is not None else "not run (--compare)"
        got += "".join(
            f"\nwith {one['num_steps']} steps N = {one['candidates']}: reward {one['reward']:.3f}"
            for one in record.get("best_of_n_at_other_steps", ())
        )
        table.add_row(
            record["prompt"],
            f"{record['reward']:.3f}",
            str(record["seed"]),
            f"N = {other['candidates']}: {got}",
            record["files"]["images"][0],
        )
    console.print(table)
    if len(records) > 20:
        console.print(f"… and {len(records) - 20} more in {out}", soft_wrap=True)
    for line in _held_out_lines(records):
        console.print(line, highlight=False, soft_wrap=True)
    if len(records) == 1:
        cost = records[0]["cost"]
        text = cost_line(Cost(**{**cost, "seconds": cost["seconds"] if cost["seconds"] is not None else float("nan")}))
        console.print(f"cost: {text} ({cost['looks']} looks)", highlight=False, soft_wrap=True)
        if "board" in records[0]["files"]:
            console.print(f"how it was found: {records[0]['files']['board']}", highlight=False, soft_wrap=True)


def _held_out_lines(records: list[Any]) -> list[str]:
    """What each held-out reward says, over all prompts."""
    lines = []
    for of_reward in zip(*(record["held_out"] for record in records if record.get("held_out")), strict=True):
        winner, median = (sum(h[key] for h in of_reward) / len(of_reward) for key in ("reward", "median"))
        images = sum(h["images"] for h in of_reward)
        compared = [h["parted"] for h in of_reward if h["parted"] is not None]
        worse = f"; worse than the median on {sum(compared)} of {len(compared)} prompts" if compared else ""
        worse += ": they may part (reward hacking)" if 2 * sum(compared) > len(compared) else ""
        lines.append(f"held out, {of_reward[0]['name']}: {winner:.3f}, median of {images} finished {median:.3f}{worse}")
    return lines
