"""Does docs/evidence.md hold a row for every table of figures in README.md and docs/, and do their records agree?

python -m tools.evidence            # part of `make lint`
python -m tools.evidence --list     # the tables of figures, with whether they have a row and a record

A table of figures is one in Markdown at least a third of whose cells below the head begin with a number. It is named by
its document and the heading above it. A record is what the command of the row wrote: a bench.json, or another JSON or
text file. It agrees when each number of the table is one of its own, rounded as the table rounds it; percentages may be
shares in the record, and GFLOP and MFLOP TFLOP.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EVIDENCE = "docs/evidence.md"
NUMBER = re.compile(r"(?<![\w.])[+-]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[+-]?\d+)?")
FIGURE = re.compile(r"\W*[x~]?\W*\.?\d")
HEADS = ("claim", "command", "last run", "hardware", "record")


@dataclass(frozen=True)
class Table:
    """A table of figures.

    Attributes:
        document: its path from the root.
        heading: above it, as links name it.
        head: names of its columns.
        rows: cells below the head.
    """

    document: str
    heading: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def key(self) -> str:
        """As evidence.md links it."""
        return f"{self.document}#{self.heading}"


@dataclass(frozen=True)
class Row:
    """A row of evidence.md: the tables that it is about, its command, when and where that was run, and its records."""

    keys: tuple[str, ...]
    command: str
    date: str
    hardware: str
    records: tuple[Path, ...]


def slug(heading: str) -> str:
    """How a heading is linked."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).strip().replace(" ", "-")


def cells(line: str) -> tuple[str, ...]:
    """Of a line of a table."""
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def tables(root: Path) -> Iterator[Table]:
    """All tables of figures in README.md and docs/, but for evidence.md itself."""
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        document = path.relative_to(root).as_posix()
        if document == EVIDENCE:
            continue
        heading, fenced, found = "", False, []
        for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
            fenced ^= line.startswith("```")
            if not fenced and (match := re.match(r"#+ (.*)", line)):
                heading = slug(match[1])
            if line.startswith("|") and not fenced:
                found.append(cells(line))
            elif found:
                rows = tuple(found[2:])
                every = [cell for row in rows for cell in row if cell]
                if every and sum(bool(FIGURE.match(cell)) for cell in every) * 3 >= len(every):
                    yield Table(document, heading, found[0], rows)
                found = []


def evidence(root: Path) -> list[Row]:
    """The rows of evidence.md.

    Raises:
        ValueError: one lacks something, or its link leads nowhere.
    """
    rows = []
    for line in (root / EVIDENCE).read_text(encoding="utf-8").splitlines():
        found = cells(line)
        if not line.startswith("|") or found == HEADS or set(found[0]) <= set("-:"):
            continue
        if len(found) != len(HEADS) or not all(found[:4]):
            raise ValueError(f"{EVIDENCE}: a row has {', '.join(HEADS)} (only the last may be empty), got {line[:90]}")
        if not re.search(r"\d{4}-\d\d(-\d\d)?", found[2]):
            raise ValueError(f"{EVIDENCE}: the last run of {found[0][:60]} needs a date such as 2026-11-28")
        keys = tuple(_document(link) for link in re.findall(r"\]\(([^)]+)\)", found[0]))
        records = [(root / "docs" / link).resolve() for link in re.findall(r"\]\(([^)]+)\)", found[4])]
        if lost := [str(record) for record in records if not record.is_file()]:
            raise ValueError(f"{EVIDENCE}: there is no record {lost[0]}")
        _, command, date, hardware, _ = found
        rows.append(Row(keys, command, date, hardware, tuple(records)))
    return rows


def _document(link: str) -> str:
    """A link of evidence.md from the root."""
    return link.removeprefix("../") if link.startswith("../") else f"docs/{link}"


def numbers(text: str) -> list[str]:
    """The numbers in a text, as they are written."""
    return [found.replace(",", "") for found in NUMBER.findall(text) if re.search(r"\d", found)]


def known(record: Path) -> list[float]:
    """All numbers of a record."""
    text = record.read_text(encoding="utf-8")
    if record.suffix != ".json":
        return [float(number) for number in numbers(text)]
    found: list[float] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                walk(part)
        elif isinstance(value, str):
            found.extend(float(number) for number in numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(float(value))

    walk(json.loads(text))
    return found


def strange(table: Table, records: Sequence[Path]) -> list[str]:
    """Numbers of a table that are in none of its records."""
    there = [value for record in records for value in known(record)]
    lost = []
    for cell in (cell for row in table.rows for cell in row):
        for number in numbers(cell):
            digits = len(number.partition(".")[2].partition("e")[0]) if "e" not in number else None
            scales = (1, 100, 1000, *[1_000_000] * ("MFLOP" in cell))
            if not any(_same(number, value * scale, digits) for value in there for scale in scales):
                lost.append(number)
    return lost


def _same(number: str, value: float, digits: int | None) -> bool:
    """Whether a value is printed as this number."""
    if digits is None:
        return abs(float(number) - value) <= 0.051 * abs(value)
    return abs(abs(float(number)) - abs(value)) <= 0.5000001 * 10.0**-digits


def problems(root: Path) -> list[str]:
    """What is wrong, one sentence each."""
    try:
        rows = evidence(root)
    except (OSError, ValueError) as error:
        return [str(error)]
    there: dict[str, list[Table]] = {}
    for table in tables(root):
        there.setdefault(table.key, []).append(table)
    claimed = {key: row for row in rows for key in row.keys}
    found = [f"{key} has a table of figures and no row in {EVIDENCE}" for key in there if key not in claimed]
    for key, row in claimed.items():
        document, _, heading = key.partition("#")
        if not (root / document).is_file() or (heading and heading not in _headings(root / document)):
            found.append(f"{EVIDENCE} names {key}, which is not there")
        elif row.records and key in there:
            lost = [number for table in there[key] for number in strange(table, row.records)]
            if lost:
                names = ", ".join(record.name for record in row.records)
                found.append(f"{key} prints {', '.join(lost[:6])}, not in its record {names}; run: {row.command}")
    return found


def _headings(path: Path) -> set[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {slug(match[1]) for line in lines if (match := re.match(r"#+ (.*)", line))}


def main() -> None:
    """List, or check."""
    if "--list" in sys.argv:
        rows = {key: row for row in evidence(ROOT) for key in row.keys} if (ROOT / EVIDENCE).is_file() else {}
        for key in dict.fromkeys(table.key for table in tables(ROOT)):
            row = rows.get(key)
            print(f"{key}: {'no row' if row is None else 'record' if row.records else 'row'}")
        return
    if wrong := problems(ROOT):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
