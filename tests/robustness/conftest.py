from __future__ import annotations

from tests.cli.conftest import ttsnap

__all__ = ["ttsnap"]
