"""`ttsnap score`: what rewards say of pictures that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ttsnap.cli.options import OUTPUT, SEARCH, AsJson, DryRun, read_prompts, tell
from ttsnap.live.scoring import ScoreSettings

if TYPE_CHECKING:
    from ttsnap.live.forecast import Work
    from ttsnap.live.scoring import Scores

ScoreOptions = Annotated[ScoreSettings, Parameter(name="*", group=SEARCH)]
Out = Parameter(group=OUTPUT)
SHOWN = 20  # pictures in the table
NAMED = 10  # faults


def score(
    *source: str,
    settings: ScoreOptions = ScoreSettings(),
    prompts: Annotated[str | None, Parameter(group=SEARCH)] = None,
    out: Annotated[Path | None, Out] = None,
    best: Annotated[int | None, Out] = None,
    copy_to: Annotated[Path | None, Out] = None,
    sheet: Annotated[bool, Parameter(group=OUTPUT, negative="--no-sheet")] = True,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Judge pictures that are there already: a table, a CSV file, a contact sheet, copies of the best.

    Try: ttsnap score photos/ --reward imagereward,aesthetic --prompt "a corgi astronaut" --best 10 --copy-to best/

    Args:
        source: Folders, patterns such as 'a/**/*.png', pictures, or tables (.csv, .tsv, .jsonl: file, prompt).
        prompts: File with prompts: a table with the columns file and prompt, or .txt or .json in the pictures' order.
        out: Output folder (default: out/score- and the source); the same command goes on with what is there.
        best: Show, and copy, so many of the best.
        copy_to: Folder for copies of the best, their rank before their name.
        sheet: Draw the contact sheet.
    """
    import json as encoder

    from ttsnap.files.finding import find_pictures
    from ttsnap.files.storage import check_writable
    from ttsnap.live.scoring import JOURNAL, save

    if not source:
        raise ValueError("give pictures, such as: ttsnap score photos/ --reward imagereward")
    if best is not None and best < 1:
        raise ValueError(f"--best must be at least 1, got {best}")
    if copy_to is not None and best is None:
        raise ValueError("--copy-to needs --best, such as --best 20")
    if settings.prompt is not None and prompts is not None:
        raise ValueError("give --prompt or --prompts, not both")
    folder = out or Path("out") / f"score-{_slug(source[0])}"
    given = settings.prompt if prompts is None else _prompts(Path(prompts))
    found = find_pictures(source, skip=[path for path in (folder, copy_to) if path], marker=JOURNAL)
    if dry_run:
        tell(_planned(found, settings), json)
        return
    check_writable(folder)
    scores = _scored(found, settings, given, folder, silent=json)
    files = save(scores, folder, sheet=sheet) | _copied(scores, best, copy_to)
    if json:
        print(encoder.dumps(scores.to_dict() | {"out": str(folder), "files": files}, indent=1))
    else:
        _show(scores, best or SHOWN, files)
    if not scores.ranked:
        first = scores.faulty[0]
        raise ValueError(f"no picture could be scored: {first.name} {first.fault}")
    if scores.faulty:
        from ttsnap.cli.workers import PARTLY

        raise SystemExit(PARTLY)


def _planned(found: Any, settings: ScoreSettings) -> Work:
    """What would be judged, as if all pictures were of the size of the first that can be read."""
    from ttsnap import rewards
    from ttsnap.files.pictures import read_picture
    from ttsnap.live.forecast import judged
    from ttsnap.pipelines.loading import find_device

    if settings.reward is None:
        raise ValueError(f"name a reward; known are {', '.join(rewards.REWARDS)}")
    size, count = (512, 512), len(found.files)
    for file in found.files:
        try:
            size = read_picture(file).size
        except ValueError:
            continue
        break
    place = find_device(settings.device)
    judges = rewards.load(settings.reward, place)
    what = f"{count} pictures, judged by {', '.join(judges)}"
    return judged(what, judges, count, size, place, count * 200 * len(judges), settings.max_batch)


def _scored(found: Any, settings: ScoreSettings, prompt: Any, folder: Path, *, silent: bool) -> Scores:
    """Judge, with progress and notes on stderr."""
    import sys
    import warnings
    from contextlib import ExitStack
    from dataclasses import asdict

    from ttsnap.cli.progress import ImageProgress, say
    from ttsnap.files.locks import locked
    from ttsnap.live.scoring import score as judge

    options = asdict(settings) | {"prompt": prompt, "out": folder}
    progress = ImageProgress("scoring", silent=silent)
    try:
        with locked(folder, say), ExitStack() as stack:

            def start(total: int) -> None:
                stack.enter_context(progress)
                progress.start(total)

            caught = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            scores: Scores = judge(found, **options, on_start=start, on_images=progress.advance)
        progress.images, progress.found = progress.images - scores.found, scores.found
    except KeyboardInterrupt:
        print(f"stopped: the same command goes on ({folder})", file=sys.stderr)
        raise SystemExit(130) from None
    notes = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)))
    for note in notes[:NAMED]:
        say(f"warning: {note}")
    if len(notes) > NAMED:
        say(f"warning: {len(notes) - NAMED} more like these")
    if scores.left_out:
        named = ", ".join(scores.left_out[:3]) + (", ..." if len(scores.left_out) > 3 else "")
        say(f"left out, as they are no pictures: {len(scores.left_out)} ({named})")
    for picture in scores.faulty[:NAMED]:
        print(f"warning: {picture.name} {picture.fault}", file=sys.stderr)
    if len(scores.faulty) > NAMED:
        print(f"warning: {len(scores.faulty) - NAMED} more pictures have no reward, see {folder}", file=sys.stderr)
    if not silent:
        say(progress.summary())
    return scores


def _prompts(file: Path) -> Any:
    """Prompts by file, or in the order of the pictures."""
    from ttsnap.files.finding import TABLES, prompts_by_file

    if file.suffix.lower() in TABLES and file.is_file() and (table := prompts_by_file(file)) is not None:
        return table
    return read_prompts([], str(file), verb="score")


def _slug(source: str) -> str:
    import re

    name = Path(source).absolute().name if Path(source).exists() else source
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:48] or "pictures"


def _copied(scores: Scores, best: int | None, folder: Path | None) -> dict[str, Any]:
    """Copy the best pictures to a folder."""
    import shutil
    from functools import partial

    from ttsnap.files.storage import atomically, check_writable

    if folder is None or best is None:
        return {}
    check_writable(folder)
    copies = []
    for place, picture in enumerate(scores.ranked[:best], 1):
        assert picture.path is not None
        copy = folder / f"{place:0{max(3, len(str(best)))}d}-{picture.path.name}"
        atomically(copy, partial(shutil.copyfile, picture.path))
        copies.append(str(copy))
    return {"best": copies}


def _show(scores: Scores, count: int, files: dict[str, Any]) -> None:
    """Print the best."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for name in ("rank", *scores.rewards):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("file", overflow="fold")
    table.add_column("prompt", overflow="ellipsis", no_wrap=True)
    for place, picture in enumerate(scores.ranked[:count], 1):
        values = [f"{picture.rewards[name]:.4g}" for name in scores.rewards]
        note = f" ({picture.note})" if picture.note else ""
        table.add_row(str(place), *values, escape(picture.name) + note, escape(picture.prompt))
    console = Console()
    if scores.ranked:
        console.print(table)
    if len(scores.ranked) > count:
        console.print(f"… and {len(scores.ranked) - count} more", highlight=False)
    for kind, what in files.items():
        said = f"{len(what)} copies in {Path(what[0]).parent}" if isinstance(what, list) and what else what
        console.print(f"{kind}: {said}", highlight=False, soft_wrap=True, markup=False)
