"""How much the command line says: set once by the options of every verb."""

from __future__ import annotations

level = 0  # -1: no progress and no notes, 1: also what diffusers and transformers have to say
debug = False  # whether errors show their traceback
