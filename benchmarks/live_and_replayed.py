"""The gain of a schedule over best-of-N, replayed from a recording and live on the same prompts with new seeds.

    ttsnap record --prompts shapes:held-out --prompt-range 0:100 --per-prompt 64 --reward shapes --out held-out.zarr
    python benchmarks/live_and_replayed.py held-out.zarr --budgets 5:10:2.5GFLOP

Replay is right when the difference of the two gains is zero within its 95 % interval, which is over prompts. The live
gain is the mean over a few draws of candidates, the replayed one over many.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from equal_cost import SEEDS, halfwidth, search
from ttsnap.core.cost import affordable, parse_budgets
from ttsnap.live.session import prepare
from ttsnap.policies import BestOfN, load
from ttsnap.recordings import Recording
from ttsnap.replay import Contender, EveryCall, cost_model_of, simulate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--policy", help="policy file (default: the schedule that ships)")
    parser.add_argument("--budgets", default="5:10:2.5GFLOP")
    parser.add_argument("--trials", type=int, default=200, help="replayed draws of candidates per prompt")
    parser.add_argument("--draws", type=int, default=4, help="live draws of candidates per prompt")
    a = parser.parse_args()
    recording = Recording.open(a.recording)
    session = prepare("shapes", reward="shapes", policy=load(a.policy) if a.policy else None, max_batch=64)
    budgets, steps, policy = parse_budgets(a.budgets), recording.shape[2], session.policy
    chosen = recording.recorded()
    prompts = [recording.prompts[index] for index in chosen]
    seeds = SEEDS * (1 + chosen[:, None]) + np.arange(SEEDS)
    per_draw = SEEDS // a.draws
    assert not np.isin(seeds, recording.seeds[chosen]).any()
    simulated = simulate(
        recording, [Contender("it", policy, "clean")], budgets, EveryCall(cost_model_of(recording)), trials=a.trials
    ).dataset
    rng = np.random.default_rng(0)
    table = Table(
        title=f"{policy}\n"
        f"{len(prompts)} prompts; mean reward gain over best-of-N, ± 95 % over prompts; {a.draws} live draws"
    )
    for name in ("budget", "N", "started", "replayed", "live", "live - replayed"):
        table.add_column(name, justify="right")
    for b, budget in enumerate(budgets):
        sizes = [affordable(kind, budget, session.cost_model, steps) for kind in (BestOfN(), policy)]
        assert sizes == [int(simulated.best_of_n_candidates[b]), int(simulated.candidates[0, b])]
        base, ours = (
            np.mean(
                [search(session, kind, size, prompts, seeds[:, per_draw * draw :])[0] for draw in range(a.draws)],
                axis=0,
            )
            for kind, size in zip((BestOfN(), policy), sizes, strict=True)
        )
        replayed = (simulated.value[0, b, :, 0] - simulated.best_of_n[b, :, 0]).values
        live = ours - base
        row = [f"{x.mean():+.3f} ± {halfwidth(x, rng):.3f}" for x in (replayed, live, live - replayed)]
        table.add_row(str(budget), *map(str, sizes), *row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
