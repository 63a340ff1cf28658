"""A comparison as a job: each block of prompts with one policy at one budget is measured, and kept, on its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ttsnap.cluster.jobs import Block, Event, Plan
from ttsnap.live.comparison import Comparison, Measuring


@dataclass(frozen=True)
class Compare:
    """Measure what is not measured yet. What the loop calls a prompt is a part of the comparison here.

    Attributes:
        comparison: what is compared.
    """

    comparison: Comparison

    def load(self) -> _Compares:
        """Nothing yet: what is loaded depends on what is left to do."""
        return _Compares(self.comparison)


class _Compares:
    def __init__(self, comparison: Comparison) -> None:
        self.comparison, self.parts = comparison, comparison.parts()
        self.measuring = Measuring(comparison)

    def plan(self) -> Plan:
        left = [number for number, part in enumerate(self.parts) if not self.comparison.file(part).is_file()]
        return Plan([(number,) for number in left], prompts=len(left))

    def run(self, block: Block, shared: Mapping[str, Any]) -> Iterator[Event]:
        for number in block:
            self.measuring.measure(self.parts[number])
            yield Event(prompts=(number,))
