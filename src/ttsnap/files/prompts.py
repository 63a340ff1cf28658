"""Files with prompts as they come: one per line, tables, JSON and JSON lines, told apart by what is in them.

So are read, among others, the lists of PartiPrompts (tab-separated, `Prompt`), DrawBench (commas and quotes, `Prompts`)
and GenEval (a JSON object a line, `prompt`).
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ttsnap.files.text import read_text

MAX_FILE = 64 << 20  # bytes
MAX_PROMPT = 10_000  # characters
MAX_VARIANTS = 1000  # that wildcards make of one prompt
COLUMNS = ("prompt", "prompts", "caption", "captions", "text", "description")
NUMBERED = re.compile(r"\s*(\d+)[.):\t]\s*(?=\S)")
WILDCARD = re.compile(r"\{([^{}]*\|[^{}]*)\}")


def tidied(prompt: str, name: str = "the prompt", most: int = MAX_PROMPT) -> str:
    """A prompt with single spaces.

    Args:
        prompt: as it was given.
        name: what messages call it.
        most: characters that are taken.

    Raises:
        ValueError: it is empty, too long, or has control characters.
    """
    if not (text := " ".join(prompt.split())):
        raise ValueError(f"{name} is empty; it needs at least one word")
    if len(prompt) > most:
        raise ValueError(f"{name} has {len(prompt)} characters; at most {most} are taken")
    check_characters(prompt, name)
    return text


def check_characters(text: str, name: str) -> None:
    """Whether a text is one that may be painted or led away from.

    Raises:
        ValueError: it has control characters; white space is none.
    """
    if not text.isprintable() and any(ord(c) < 32 and not c.isspace() for c in text):
        raise ValueError(f"{name} has a control character: {text[:40]!r}")


def read_prompt_file(path: Path, column: str | None = None) -> list[str]:
    """The prompts of a file.

    Args:
        path: .txt (one per line; lines that begin with `# ` are comments, numbers 1, 2, 3 ... are left out), .csv,
            .tsv, .json or .jsonl; a table is known by its header, too.
        column: of a table or of JSON objects, the one with the prompts: its name, or its number from 1.

    Raises:
        ValueError: it cannot be read, or several columns could be meant.
    """
    text, kind = read_text(path, MAX_FILE, "prompts from"), path.suffix.lower()
    if kind in (".json", ".jsonl", ".ndjson") or text.lstrip().startswith("{"):
        rows = _json(path, text)
        return rows if _plain(rows) and column is None else _column(path, rows, column)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if kind in (".csv", ".tsv") or column is not None or _heads(first):
        return _table(path, text, first, column)
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r"\s*#(\s|#|$)", line)]
    return _without_numbers(lines)


def variants(prompt: str) -> list[str]:
    """All prompts that a prompt with wildcards stands for: `a {red|blue} {cat|dog}` for four, in that order.

    Raises:
        ValueError: they are too many.
    """
    found = [prompt]
    while any(WILDCARD.search(text) for text in found):
        made = []
        for text in found:
            if match := WILDCARD.search(text):
                made += [text[: match.start()] + word.strip() + text[match.end() :] for word in match[1].split("|")]
            else:
                made.append(text)
        found = list(dict.fromkeys(made))
        if len(found) > MAX_VARIANTS:
            raise ValueError(f"the wildcards of {prompt[:60]!r} make more than {MAX_VARIANTS} prompts; leave out some")
    return found


# JSON.


def _json(path: Path, text: str) -> list[Any]:
    """The rows of a JSON list, object, or of a JSON object a line."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as whole:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if path.suffix.lower() == ".json" and not (len(lines) > 1 and _loads(lines[0][1])):
            raise ValueError(f"{path} is not valid JSON: {whole}") from whole
        return [_line(path, number, line) for number, line in lines]
    if isinstance(data, dict):
        named = [value for key, value in data.items() if key.lower() in COLUMNS]
        if named and isinstance(named[0], list):  # {"prompts": [...]}
            return named[0]
        of_ids = bool(data) and all(isinstance(value, dict) for value in data.values())
        data = list(data.values()) if of_ids else [data]
    if not isinstance(data, list) or not data or data == [{}]:
        raise _no_list(path)
    return data


def _loads(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON in line {number}: {error}") from error


def _plain(rows: Sequence[Any]) -> bool:
    return all(isinstance(row, str) for row in rows)


def _column(path: Path, rows: Sequence[Any], column: str | None) -> list[str]:
    """What JSON objects have under the name of a column."""
    if not all(isinstance(row, dict) for row in rows):
        raise _no_list(path)
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    name = names[_chosen(path, names, column)]
    lacking = next((place for place, row in enumerate(rows, 1) if not isinstance(row.get(name), str)), None)
    if lacking:
        raise ValueError(f"{path} has no text as {name!r} in row {lacking}; each row needs a prompt")
    return [row[name] for row in rows]


def _no_list(path: Path) -> ValueError:
    return ValueError(
        f'{path} must hold a JSON list of strings, such as ["a red circle", "a blue square"], or objects with a prompt'
    )


# Tables.


def _heads(line: str) -> bool:
    """Whether a line is the header of a table with tabs, one column of it of prompts (commas stand in prompts, too)."""
    cells = [cell.strip().strip('"').lower() for cell in line.split("\t")]
    return len(cells) > 1 and any(cell in COLUMNS for cell in cells)


def _table(path: Path, text: str, first: str, column: str | None) -> list[str]:
    """The column of prompts of a table, with a header or without."""
    tab = path.suffix.lower() == ".tsv" or "\t" in first
    delimiter = "\t" if tab else (";" if first.count(";") > first.count(",") else ",")
    bare = tab and '"' not in first  # then a quote in a prompt is an inch mark, or what it says
    try:
        lines = io.StringIO(text, newline="")
        quoting = csv.QUOTE_NONE if bare else csv.QUOTE_MINIMAL
        rows = list(csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=not tab))  # type: ignore[arg-type]
    except csv.Error as error:
        raise ValueError(f"{path} is not a valid table: {error}") from error
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if bare:
        rows = [[_unquoted(cell) for cell in row] for row in rows]
    if not rows:
        return []
    names = [cell.strip() for cell in rows[0]]
    numbered = column is not None and column.isdigit() and column not in names
    headed = any(name.lower() in COLUMNS for name in names) or (column is not None and not numbered)
    if len(names) == 1 and not headed:
        place = 0
    elif not headed and not numbered:
        raise ValueError(
            f"{path} has no header that tells which column holds the prompts; name it by its number, such as "
            f"--prompt-column 1: {names[0][:40]!r}"
        )
    else:
        place = _chosen(path, names, column)
    body = rows[1:] if headed else rows
    short = next((number for number, row in enumerate(body, 1 + headed) if len(row) <= place), None)
    if short:
        raise ValueError(f"{path} has no column {place + 1} in row {short}; quote prompts that hold a {delimiter!r}")
    return [row[place] for row in body]


def _unquoted(cell: str) -> str:
    """A cell of tab-separated text without the quotes that a writer put around it because there are some in it."""
    inner = cell[1:-1]
    quoted = cell[:1] == cell[-1:] == '"' and '""' in inner and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _chosen(path: Path, names: Sequence[str], column: str | None) -> int:
    """The place of the column that is named, by its name or number, or else the only one that can be meant."""
    lower = [name.lower() for name in names]
    if column is not None:
        if column.lower() in lower:
            return lower.index(column.lower())
        if column.isdigit() and 1 <= int(column) <= len(names):
            return int(column) - 1
        raise ValueError(f"{path} has no column {column!r}; it has {', '.join(names)}")
    meant = [name for name in COLUMNS if name in lower]
    if not meant:
        raise ValueError(f"{path} has no column `prompt`; name one with --prompt-column: {', '.join(names)}")
    if len(meant) > 1 and meant[0] not in ("prompt", "prompts"):
        raise ValueError(f"in {path} {' and '.join(meant)} could hold the prompts; name one with --prompt-column")
    return lower.index(meant[0])


def _without_numbers(lines: list[str]) -> list[str]:
    """Lines without their numbers, where these are 1, 2, 3 ... (or begin at 0) through all of the file."""
    matches = [NUMBERED.match(line) for line in lines]
    numbers = [int(match[1]) for match in matches if match]
    counted = len(lines) > 1 and len(numbers) == len(lines) and numbers[0] in (0, 1)
    if not counted or any(b != a + 1 for a, b in itertools.pairwise(numbers)):
        return lines
    return [line[match.end() :] for line, match in zip(lines, matches, strict=True) if match]
