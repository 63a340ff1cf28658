"""What a simulation found: the arrays, and tables with intervals made from them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.core.grid import BoolArray, FloatArray
from ttsnap.replay.statistics import candidates_to_reach, interval, relative_increase, resample

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

SAMPLES = 1000


@dataclass(frozen=True)
class Simulation:
    """Rewards of policies at budgets, on the same prompts and draws, with best-of-N beside them.

    Intervals are 95 % bootstrap intervals over prompts: they say how the figure would vary with other prompts. The
    Monte Carlo error says how it would vary with other draws of the same prompts.

    Attributes:
        dataset: `value` [policy, budget, prompt, reward] (mean over trials), `trial_value` [policy, budget, trial,
            reward] (mean over prompts), `candidates`, `nfe`, `looks`, `tflop` [policy, budget] per prompt; best-of-N at
            each budget as `best_of_n` [budget, prompt, reward] and at each size as `curve` [size, prompt, reward]. NaN
            where a budget pays for no candidate or for more than recorded. Rewards are in the recording's scale.
        policies: each policy as a JSON object with its name and guide.
    """

    dataset: xr.Dataset
    policies: tuple[dict[str, Any], ...]

    @property
    def names(self) -> list[str]:
        """Names of the policies."""
        return [str(name) for name in self.dataset.policy.values]

    @property
    def common(self) -> BoolArray:
        """Budgets [budgets] that every policy and best-of-N can use; relative increases are taken over these."""
        values = self.dataset.value.values
        usable = np.isfinite(values).all(axis=(0, 2, 3)) & np.isfinite(self.dataset.best_of_n.values).all(axis=(1, 2))
        return np.asarray(usable)

    def notes(self) -> list[str]:
        """Sentences about budgets that could not be used; nothing is clipped silently."""
        unit, pool = self.dataset.attrs["unit"], self.dataset.attrs["pool"]
        sentences = []
        rows = [*zip(self.names, self.dataset.candidates.values, strict=True)]
        for name, wanted in [*rows, ("best-of-N", self.dataset.best_of_n_candidates.values)]:
            for wrong, what in (
                (wanted > pool, f"more candidates than the {pool} recorded"),
                (wanted < 1, "not even one image"),
            ):
                if wrong.any():
                    amounts = self.dataset.budget.values[wrong]
                    span = f"{amounts[0]:g}" if len(amounts) == 1 else f"{amounts[0]:g} to {amounts[-1]:g}"
                    wants = f" (up to {wanted[wrong].max()})" if "more" in what else ""
                    verb = "would start" if "more" in what else "can pay for"
                    sentences.append(f"at {span} {unit} {name} {verb} {what}{wants}; left out")
        return sentences

    @functools.cached_property
    def _weights(self) -> FloatArray:
        rng = np.random.default_rng([self.dataset.attrs["seed"], 1])
        return resample(self.dataset.sizes["prompt"], SAMPLES, rng)

    @functools.cached_property
    def rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What `table` and `summary` hold, as JSON objects; None where there is no number."""
        rows: list[dict[str, Any]] = []
        policies: list[dict[str, Any]] = []
        for r, reward in enumerate(self.dataset.reward.values):
            one_image = self.dataset.attrs["one_image_tflop"]
            sizes = self.dataset["size"].values
            curve = self.dataset.curve.values[..., r]  # [sizes, prompts]
            curves = self._weights @ curve.T
            baseline = self.dataset.best_of_n.values[..., r]  # [budgets, prompts]
            baselines = self._weights @ baseline.T
            for p, name in enumerate(self.names):
                value = self.dataset.value.values[p, ..., r]
                values = self._weights @ value.T  # [samples, budgets]
                tflop = self.dataset.tflop.values[p]
                multiplier = candidates_to_reach(value.mean(axis=1), sizes, curve.mean(axis=1)) * one_image / tflop
                reached = [candidates_to_reach(v, sizes, c) for v, c in zip(values, curves, strict=True)]
                multipliers = np.array(reached) * one_image / tflop
                trial = self.dataset.trial_value.values[p, ..., r]  # [budgets, trials]
                rows += self._rows(p, r, value, values, baseline, baselines, multiplier, multipliers, trial)
                policies.append(
                    {"policy": name, "reward_name": str(reward)}
                    | self._merit(value, values, baseline, baselines, multiplier, multipliers, trial)
                    | {"hyperparameters": self.policies[p]}
                )
        return rows, policies

    def _rows(
        self,
        policy: int,
        reward: int,
        value: FloatArray,
        values: FloatArray,
        baseline: FloatArray,
        baselines: FloatArray,
        multiplier: FloatArray,
        multipliers: FloatArray,
        trial: FloatArray,
    ) -> list[dict[str, Any]]:
        unit = self.dataset.attrs["unit"]
        rows = []
        for b, budget in enumerate(self.dataset.budget.values):
            rows.append(
                {
                    "policy": self.names[policy],
                    "reward_name": str(self.dataset.reward.values[reward]),
                    "budget": float(budget),
                    "budget_unit": unit,
                    "budget_tflop": float(budget) if unit == "TFLOP" else None,
                    "candidates": int(self.dataset.candidates.values[policy, b]),
                    "reward": _number(value[b].mean()),
                    "ci95": _pair(interval(values[:, b])),
                    "monte_carlo_error": _number(_error(trial[b])),
                    "nfe": _number(self.dataset.nfe.values[policy, b]),
                    "looks": _number(self.dataset.looks.values[policy, b]),
                    "tflop": _number(self.dataset.tflop.values[policy, b]),
                    "best_of_n_candidates": int(self.dataset.best_of_n_candidates.values[b]),
                    "best_of_n_reward": _number(baseline[b].mean()),
                    "gain": _number((value[b] - baseline[b]).mean()),
                    "gain_ci95": _pair(interval(values[:, b] - baselines[:, b])),
                    "compute_multiplier": _number(multiplier[b]),
                    "compute_multiplier_ci95": _pair(interval(multipliers[:, b])),
                }
            )
        return rows

    def _merit(
        self,
        value: FloatArray,
        values: FloatArray,
        baseline: FloatArray,
        baselines: FloatArray,
        multiplier: FloatArray,
        multipliers: FloatArray,
        trial: FloatArray,
    ) -> dict[str, Any]:
        """Relative increase and compute multiplier of one policy over the budgets that all can use."""
        common = self.common
        budgets = self.dataset.budget.values[common]
        if not common.any():
            return dict.fromkeys(
                ("relative_increase_percent", "relative_increase_ci95", "compute_multiplier", "compute_multiplier_ci95")
            )
        base = baseline.mean(axis=1)[common]
        increase = relative_increase(budgets, value.mean(axis=1)[common], base)
        by_trial = relative_increase(budgets, trial.T[:, common], base)
        with np.errstate(divide="ignore"):
            mean, means = (np.exp(np.log(m[..., common]).mean(axis=-1)) for m in (multiplier, multipliers))
        return {
            "relative_increase_percent": _number(increase),
            "relative_increase_ci95": _pair(
                interval(relative_increase(budgets, values[:, common], baselines[:, common]))
            ),
            "relative_increase_monte_carlo_error": _number(_error(by_trial)),
            "compute_multiplier": _number(mean),
            "compute_multiplier_ci95": _pair(interval(means)),
            "budgets_used": [float(budget) for budget in budgets],
        }

    @property
    def table(self) -> pd.DataFrame:
        """One row per reward, policy and budget."""
        import pandas as pd

        return pd.DataFrame(self.rows[0])

    @property
    def summary(self) -> pd.DataFrame:
        """One row per reward and policy: relative increase and compute multiplier, with intervals."""
        import pandas as pd

        return pd.DataFrame(self.rows[1])

    def to_dict(self) -> dict[str, Any]:
        """Everything as one JSON object."""
        from ttsnap.core import __version__

        rows, policies = self.rows
        keys = (
            "recording",
            "accounting",
            "cost_model",
            "call_tflop",
            "look_tflop",
            "early_looks",
            "trials",
            "seed",
            "pool",
            "combine",
        )
        return {
            "results": rows,
            "policies": policies,
            "notes": self.notes(),
            "settings": {key: self.dataset.attrs[key] for key in keys}
            | {"prompts": self.dataset.sizes["prompt"], "version": __version__},
        }


def _error(trials: FloatArray) -> float:
    """Standard error of the mean over trials; NaN for one trial."""
    return float(trials.std(ddof=1) / np.sqrt(len(trials))) if len(trials) > 1 else float("nan")


def _number(value: Any) -> float | None:
    """A float for JSON: neither NaN nor infinity."""
    return float(value) if np.isfinite(value) else None


def _pair(values: Sequence[Any] | FloatArray) -> list[float | None]:
    return [_number(value) for value in values]
