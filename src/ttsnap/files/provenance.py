"""Where an artifact comes from: versions of what made it, and the commit of a checkout."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from ttsnap.core import __version__

_PACKAGES = ("numpy", "torch", "diffusers", "transformers", "pillow", "zarr")


def versions() -> dict[str, str]:
    """Versions by package, of those installed; `commit` where ttsnap runs from a checkout."""
    found = {"ttsnap": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = _commit(Path(__file__).resolve().parents[3])
    return found | ({"commit": commit} if commit else {})


def _commit(root: Path) -> str | None:
    """The commit that `root` has checked out; None if it is no checkout."""
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
