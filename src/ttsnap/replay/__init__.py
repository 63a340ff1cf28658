"""Replay at scale: curves of reward against budget, their intervals, tuned schedules and plots."""

from __future__ import annotations

from ttsnap.replay.accounting import EveryCall, Published, accounting_of, cost_model_of, default_budgets
from ttsnap.replay.one_prompt import Replayed, replay_prompt
from ttsnap.replay.results import Simulation
from ttsnap.replay.simulator import Contender, simulate
from ttsnap.replay.tuning import Tuning, tune

__all__ = [
    "Contender",
    "EveryCall",
    "Published",
    "Replayed",
    "Simulation",
    "Tuning",
    "accounting_of",
    "cost_model_of",
    "default_budgets",
    "replay_prompt",
    "simulate",
    "tune",
]
