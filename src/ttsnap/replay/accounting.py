"""Who may start how many candidates for a budget, and what that is charged: every call, or as once published."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from ttsnap.core.cost import NAMED_COST_MODELS, Budget, CostModel, affordable
from ttsnap.core.grid import FloatArray, Policy
from ttsnap.policies import BestOfN, EarlySelection, SuccessiveHalving
from ttsnap.policies.rungs import steps_of
from ttsnap.recordings import Recording


class Accounting(Protocol):
    """A convention for charging a policy."""

    @property
    def name(self) -> str:
        """Its name on the command line."""
        ...

    @property
    def model(self) -> CostModel:
        """Cost of one call, decode and look."""
        ...

    def under(self, guide: str) -> Accounting:
        """The same where looks see the guide `aware` or `clean`; looks of features cost less than pictures."""
        ...

    def candidates(self, policy: Policy, budget: Budget, num_steps: int) -> int:
        """Candidates per prompt that the budget pays for; 0 if not even one."""
        ...

    def tflop(self, policy: Policy, candidates: int, num_steps: int, nfe: float, looks: FloatArray) -> float:
        """TFLOP per prompt that a search is charged for what its ledger counted: `nfe`, and `looks` [num_steps]."""
        ...


@dataclass(frozen=True)
class EveryCall:
    """Every call, every decode and every look counts; sizes are whole. The default."""

    model: CostModel
    name: str = "calls"

    def under(self, guide: str) -> EveryCall:
        """The same where looks see the guide `aware` or `clean`."""
        return replace(self, model=self.model.under(guide))

    def candidates(self, policy: Policy, budget: Budget, num_steps: int) -> int:
        """The largest number whose plan fits the budget."""
        least = self.model.of_plan(policy.plan(1, num_steps)).amount(budget.unit)
        return 0 if least > budget.amount * (1 + 1e-12) else affordable(policy, budget, self.model, num_steps)

    def tflop(self, policy: Policy, candidates: int, num_steps: int, nfe: float, looks: FloatArray) -> float:
        """What the ledger counted, by the cost model."""
        return float(self.model.tflop(nfe, looks))


@dataclass(frozen=True)
class Published:
    """The TTSnap authors' convention, for reproducing their figures.

    It charges s calls where s + 1 were made (their step ids count from 0), for the finished image too, while best-of-N
    pays all; and it multiplies keep ratios instead of counting whole candidates.
    """

    model: CostModel
    name: str = "published"

    def under(self, guide: str) -> Published:
        """The same where looks see the guide `aware` or `clean`."""
        return replace(self, model=self.model.under(guide))

    def candidates(self, policy: Policy, budget: Budget, num_steps: int) -> int:
        """The budget divided by the cost of one candidate, rounded down."""
        if budget.unit != "TFLOP":
            raise ValueError(f"the published accounting knows budgets in TFLOP only, got {budget}")
        return int(budget.amount / self._one_candidate(policy, num_steps))

    def tflop(self, policy: Policy, candidates: int, num_steps: int, nfe: float, looks: FloatArray) -> float:
        """Candidates times the cost of one."""
        return candidates * self._one_candidate(policy, num_steps)

    def _one_candidate(self, policy: Policy, num_steps: int) -> float:
        call, last = self.model.call_tflop, self.model.look(num_steps).tflop
        if isinstance(policy, BestOfN):
            return num_steps * call + last
        if not isinstance(policy, SuccessiveHalving) or policy.keep is None:
            kind = "early selection" if isinstance(policy, EarlySelection) else type(policy).__name__
            raise ValueError(f"the published accounting knows best-of-n and halving with keep ratios, not {kind}")
        cost, share, before = 0.0, 1.0, 0
        for index, step in steps_of(policy.rungs, num_steps):
            cost += share * ((step - 1 - before) * call + self.model.look(step).tflop)
            share *= policy.keep[index]
            before = step - 1
        return cost + share * ((num_steps - 1 - before) * call + last)


ACCOUNTINGS: dict[str, type[EveryCall] | type[Published]] = {"calls": EveryCall, "published": Published}


def accounting_of(name: str, model: CostModel) -> Accounting:
    """The accounting of that name.

    Raises:
        ValueError: unknown name.
    """
    if name not in ACCOUNTINGS:
        raise ValueError(f"unknown accounting {name!r}; known are {', '.join(ACCOUNTINGS)}")
    return ACCOUNTINGS[name](model)


def cost_model_of(
    recording: Recording,
    name: str | None = None,
    *,
    call_tflop: float | None = None,
    look_tflop: float | None = None,
) -> CostModel:
    """The cost model to charge replayed searches with.

    Args:
        recording: its own cost model, counted when it was made, is the default; `flux-512` for published FLUX values.
        name: of a named cost model.
        call_tflop: TFLOP of one call, in place of a name.
        look_tflop: TFLOP of one look, decode included, in place of a name.

    Raises:
        ValueError: unknown name, one of two numbers missing or not positive, or nothing said and nothing recorded.
    """
    if call_tflop is not None or look_tflop is not None:
        if name is not None:
            raise ValueError("give a named cost model or TFLOP of a call and a look, not both")
        if call_tflop is None or look_tflop is None:
            raise ValueError("the TFLOP of a call and of a look are needed together")
        if not (call_tflop > 0 and look_tflop >= 0):
            raise ValueError(
                f"a call must cost more than 0 TFLOP and a look at least 0, got {call_tflop:g}, {look_tflop:g}"
            )
        return CostModel(f"{call_tflop:g} TFLOP a call, {look_tflop:g} a look", call_tflop, 0.0, look_tflop)
    if name is None:
        recorded = recording.provenance.get("cost_model")
        if isinstance(recorded, dict):
            return CostModel.read(recorded)
        name = {"flux": "flux-512"}.get(str(recording.provenance.get("model")))
    if name is None:
        raise ValueError(
            f"the recording does not say what a call costs; name a cost model ({', '.join(NAMED_COST_MODELS)}) "
            "or give the TFLOP of a call and a look"
        )
    if name not in NAMED_COST_MODELS:
        raise ValueError(f"unknown cost model {name!r}; known are {', '.join(NAMED_COST_MODELS)}")
    return NAMED_COST_MODELS[name]


def default_budgets(model: CostModel, num_steps: int) -> list[Budget]:
    """What best-of-2, -4, ... -20 cost."""
    plan = BestOfN().plan
    return [Budget(model.of_plan(plan(size, num_steps)).tflop, "TFLOP") for size in range(2, 21, 2)]
