"""The generated tables of docs/models.md, from the families that ttsnap knows.

python -m tools.model_tables            # renew them
python -m tools.model_tables --check    # part of `make lint`: are they as they should be?
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ttsnap.pipelines.catalogue import HEAD, families, rows

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"


def tables() -> dict[str, str]:
    """The generated parts by name, in Markdown."""
    known = families()
    notes = [[f.name, f.note or "-", f.source or "-"] for f in known if f.note or f.source]
    ways = list(next(found for f in known if (found := f.memory_gb())))
    memory = [[f.name, *(f"{f.memory_gb()[way]:.3g}" for way in ways)] for f in known if f.memory_gb()]
    commands = [f"# {f.name}\n{f.command}" for f in known]
    return {
        "families": _markdown([HEAD, ["---"] * len(HEAD), *rows(known)]),
        "memory": _markdown([["GB of weights", *ways], ["---"] * (1 + len(ways)), *memory]),
        "notes": _markdown([["model", "note", "steps, guidance and size from"], ["---"] * 3, *notes]),
        "commands": "```sh\n" + "\n".join(commands) + "\n```",
    }


def _markdown(table: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def renewed(document: str, parts: Mapping[str, str]) -> str:
    """A Markdown document with its generated parts, between `<!-- name -->` and `<!-- end -->`, made anew."""
    for name, text in parts.items():
        before, start, rest = document.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not start or not end or f"<!-- {name} -->" in after:
            raise ValueError(f"the document needs one part <!-- {name} --> ... <!-- end -->")
        document = f"{before}{start}{text}\n{end}{after}"
    return document


def main(path: Path, parts: Mapping[str, str]) -> None:
    """Renew or check a document."""
    text = path.read_text()
    if "--check" not in sys.argv:
        path.write_text(renewed(text, parts))
    elif renewed(text, parts) != text:
        sys.exit(f"{path.name} is not as its sources say; renew it: {Path(sys.argv[0]).stem} in tools/")


if __name__ == "__main__":
    main(DOCUMENT, tables())
