"""Closed forms, intervals and the two figures of merit of a policy.

The *relative increase* compares areas under curves of reward against budget, as the TTSnap authors do:
(A - A_bon) / A_bon, each A the Simpson integral over the budgets of (reward - best-of-N's reward at the first budget).
The *compute multiplier* is N'/N: best-of-N' reaches the reward that the policy reaches for the cost of best-of-N.
"""

from __future__ import annotations

import numpy as np

from ttsnap.core.grid import FloatArray, IntArray


def best_of_n_weights(pool: int, sizes: IntArray) -> FloatArray:
    """Probability [sizes, pool] that the k-th lowest of a pool is the best of N drawn without replacement.

    P(k) = C(k - 1, N - 1) / C(pool, N) for k = 1..pool.
    """
    from scipy.special import gammaln

    k = np.arange(1, pool + 1)[None, :]
    n = np.asarray(sizes)[:, None]
    if (n < 1).any() or (n > pool).any():
        raise ValueError(f"best-of-N from a pool of {pool} needs N in 1..{pool}, got {np.asarray(sizes).tolist()}")

    def log_binomial(a: FloatArray | IntArray, b: FloatArray | IntArray) -> FloatArray:
        return np.asarray(gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1))

    possible = k >= n
    exponent = log_binomial(np.where(possible, k - 1, n - 1), n - 1) - log_binomial(np.full_like(n, pool), n)
    weights = np.where(possible, np.exp(exponent), 0.0)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def best_of_n(rewards: FloatArray, sizes: IntArray, chosen_by: FloatArray | None = None) -> FloatArray:
    """Expected reward [sizes, prompts, rewards] of the best of N drawn without replacement from the pool; exact.

    Args:
        rewards: of finished images [prompts, pool, rewards].
        sizes: the N [sizes].
        chosen_by: what decides who is best [prompts, pool] (default: the only reward). The candidates that it ties are
            equally likely to be chosen.
    """
    if chosen_by is None:
        if rewards.shape[2] != 1:
            raise ValueError("best-of-N over several rewards needs to know what decides who is best")
        chosen_by = rewards[..., 0]
    worst_first = np.argsort(chosen_by, axis=1, kind="stable")
    ordered = np.take_along_axis(np.asarray(rewards, dtype=np.float64), worst_first[..., None], axis=1)
    if rewards.shape[2] > 1:
        keys = np.take_along_axis(chosen_by, worst_first, axis=1)
        for prompt in np.flatnonzero((keys[:, 1:] == keys[:, :-1]).any(axis=1)):
            _, group = np.unique(keys[prompt], return_inverse=True)
            for reward in range(rewards.shape[2]):
                sums = np.bincount(group, weights=ordered[prompt, :, reward])
                ordered[prompt, :, reward] = (sums / np.bincount(group))[group]
    weights = best_of_n_weights(rewards.shape[1], sizes)
    return np.asarray(np.einsum("nk,pkr->npr", weights, ordered, optimize=True))


def relative_increase(budgets: FloatArray, rewards: FloatArray, baseline: FloatArray) -> FloatArray:
    """Percent [...] by which `rewards` [..., budgets] exceed best-of-N's `baseline`; NaN for a single budget."""
    from scipy.integrate import simpson

    if len(budgets) < 2:
        return np.full(np.broadcast_shapes(rewards.shape[:-1], baseline.shape[:-1]), np.nan)
    start = baseline[..., :1]
    area = simpson(baseline - start, x=budgets, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(100 * (simpson(rewards - start, x=budgets, axis=-1) - area) / area)


def candidates_to_reach(reward: FloatArray, sizes: FloatArray, curve: FloatArray) -> FloatArray:
    """The N' at which best-of-N' reaches `reward` [...], between the points of its `curve` [sizes].

    Rewards below the first point give the first size; rewards beyond the last give infinity.
    """
    rising = np.maximum.accumulate(curve)
    reached = np.interp(reward, rising, sizes)
    return np.where(reward > rising[-1], np.inf, reached)


def resample(num_prompts: int, samples: int, rng: np.random.Generator) -> FloatArray:
    """Weights [samples, prompts] of a bootstrap over prompts, each row summing to one."""
    return rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=samples) / num_prompts


def interval(samples: FloatArray, level: float = 0.95) -> FloatArray:
    """Percentile interval [2, ...] over the first axis."""
    tail = (1 - level) / 2
    if not np.isinf(samples).any():
        return np.asarray(np.quantile(samples, [tail, 1 - tail], axis=0))
    return np.asarray(np.quantile(samples, [tail, 1 - tail], axis=0, method="nearest"))


def rank_correlation(guide: FloatArray, target: FloatArray) -> FloatArray:
    """Spearman correlation [prompts, steps] of a guide [prompts, pool, steps] with a target [prompts, pool].

    0 where all candidates of a prompt are worth the same.
    """
    from scipy.stats import rankdata

    def standardised(values: FloatArray) -> FloatArray:
        centred = rankdata(values, axis=1) - (values.shape[1] + 1) / 2
        norm = np.sqrt((centred**2).sum(axis=1, keepdims=True))
        return np.asarray(np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 0))

    goal = standardised(target)
    by_step = [(standardised(guide[:, :, step]) * goal).sum(axis=1) for step in range(guide.shape[2])]
    return np.stack(by_step, axis=1)
