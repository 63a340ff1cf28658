"""What all tests share."""

from __future__ import annotations

import os

# Tiny tensors gain nothing from a second thread, and lose much where other work runs on the same cores.
# Set before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
