"""The tables of docs/leaderboard.md, from the records of `ttsnap bench` in docs/leaderboard/.

python -m tools.leaderboard            # renew them
python -m tools.leaderboard --check    # part of `make lint`: are they as they should be?
"""

from __future__ import annotations

from pathlib import Path

from tools.model_tables import main
from ttsnap.live.leaderboard import read, report

DOCUMENT = Path(__file__).parents[1] / "docs" / "leaderboard.md"


def tables() -> dict[str, str]:
    """The generated parts by the name of their record: the command, what was measured, and the table."""
    records = sorted((DOCUMENT.parent / "leaderboard").glob("*.json"))
    return {path.stem: report(read(path)).rstrip() for path in records}


if __name__ == "__main__":
    main(DOCUMENT, tables())
