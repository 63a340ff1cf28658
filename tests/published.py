"""Where the published data lie, which have no licence to be copied."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
VALUES = SHARED / "ttsnap_values"
needs_values = pytest.mark.skipif(
    not VALUES.is_dir(), reason="the published reward values (shared/ttsnap_values) are not on this machine"
)
