"""Replay at scale: curves of reward against budget, their intervals, tuned schedules and plots."""

from __future__ import annotations

from ttsnap.simulation.accounting import EveryCall, Published, accounting_of, cost_model_of
from ttsnap.simulation.results import Simulation
from ttsnap.simulation.simulate import Contender, simulate

__all__ = ["Contender", "EveryCall", "Published", "Simulation", "accounting_of", "cost_model_of", "simulate"]
