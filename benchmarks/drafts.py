"""Drafts: searches whose candidates come to their looks with a cache, and the same searches without, at equal cost.

    OMP_NUM_THREADS=1 python benchmarks/drafts.py --prompts 48 --budget 18GFLOP --out runs/drafts.json

Held-out prompts of the hard level, the clean reward on pictures of early looks, the same seeds for all. What a cached
call does not compute is counted block by block and not charged; finished images are made again with whole calls, and
charged. First what a draft's call computes and how its looks rank (Kendall tau with the finished image's reward, 8
prompts x 8 candidates); then the searches, each beside the same policy without a cache (95 %, bootstrap over prompts).
What is measured is kept in `--out` and not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from equal_cost import SEEDS, halfwidth, search
from ttsnap import policies
from ttsnap.core.grid import Query
from ttsnap.core.ranking import kendall_tau
from ttsnap.live.session import prepare
from ttsnap.policies import SuccessiveHalving
from ttsnap.shapes.hard import check, held_out_prompts

TAYLOR = "TaylorSeer,cache_interval=3,disable_cache_before_step=3,max_order=1,taylor_factors_dtype=float32"
CACHES = {
    "TaylorSeer, blocks": TAYLOR + r",cache_identifiers=transformer_blocks\.\d+;single_transformer_blocks\.\d+",
    "TaylorSeer, attention": TAYLOR,
    "FirstBlock .2": "FirstBlock,threshold=.2",
}
LOOKS = (3, 7, 12)
POLICIES = {
    "halving at 3, 7, 12": SuccessiveHalving((3, 7, 12), (0.4, 0.4, 0.5)),
    "one look, at 12": SuccessiveHalving((12,), sizes=(1,)),
    "svdd": policies.named("svdd"),
}


def ranks(cache, prompts, candidates=8):
    """Share of a whole call that the calls of a draft compute, until the last look, and tau at each look."""
    session = prepare("shapes-hard", reward="shapes-hard", report="none", policy="best-of-n", draft_cache=cache)
    seeds = SEEDS * (1 + np.arange(len(prompts))[:, None]) + np.arange(candidates)
    grid, every = session.engine().grid(prompts, seeds), np.ones(seeds.shape, dtype=bool)
    looks = [grid.observe(Query(every, step))[..., 0] for step in LOOKS]
    calls = seeds.size * LOOKS[-1] * session.cost_model.call_tflop
    share = 1 - grid.saved.sum() / calls
    final = grid.observe(Query(every, session.sampler.num_steps))[..., 0]
    return {"share": share, "tau": [float(np.nanmean(kendall_tau(look, final))) for look in looks]}


def searched(policy, cache, prompts, budget):
    """Reward, verdict and TFLOP of each prompt, and how many candidates were started."""
    session = prepare(
        "shapes-hard", reward="shapes-hard", report="none", policy=policy, budget=budget, draft_cache=cache
    )
    seeds = SEEDS * (1 + np.arange(len(prompts))[:, None]) + np.arange(session.candidates)
    found = search(session, policy, session.candidates, prompts, seeds, check)
    names = ("reward", "right", "tflop")
    return dict(zip(names, map(np.ndarray.tolist, found), strict=True)) | {"started": session.candidates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--budget", default="18GFLOP")
    parser.add_argument("--policies", default=",".join(map(str, range(len(POLICIES)))), help="numbers of them")
    parser.add_argument("--caches", default=",".join(map(str, range(len(CACHES)))), help="numbers of them")
    parser.add_argument("--out", type=Path, default=Path("runs/drafts.json"))
    a = parser.parse_args()
    prompts = held_out_prompts()[: a.prompts]
    known = json.loads(a.out.read_text()) if a.out.exists() else {}

    def once(key, measure):
        if key not in known:
            known[key] = measure()
            a.out.parent.mkdir(parents=True, exist_ok=True)
            a.out.write_text(json.dumps(known))
        return known[key]

    caches = {None: None} | {name: CACHES[name] for n, name in enumerate(CACHES) if str(n) in a.caches.split(",")}
    print(f"| cache | computed | {' | '.join(f'tau at {step}' for step in LOOKS)} |\n{'|---' * (2 + len(LOOKS))}|")
    for name, cache in caches.items():
        row = once(f"ranks {name}", lambda cache=cache: ranks(cache, prompts[:8]))
        print(
            f"| {name or 'none'} | {row['share']:.2f} | {' | '.join(f'{tau:.2f}' for tau in row['tau'])} |", flush=True
        )
    print(
        "\n| policy | cache | started | GFLOP paid | reward | right | reward gained | right gained |\n"
        + "|---" * 8
        + "|"
    )
    rng = np.random.default_rng(0)
    chosen = [pair for n, pair in enumerate(POLICIES.items()) if str(n) in a.policies.split(",")]
    for title, policy in chosen:
        for name, cache in caches.items():
            key = f"{title}, {name}, {a.budget}, {a.prompts}"
            row = once(key, lambda policy=policy, cache=cache: searched(policy, cache, prompts, a.budget))
            base = known[f"{title}, {None}, {a.budget}, {a.prompts}"]
            gains = [np.subtract(row[what], base[what]) for what in ("reward", "right")] if cache else []
            cells = [f"{g.mean():+.2f} ± {halfwidth(g, rng):.2f}" for g in gains] or ["", ""]
            cells = [np.mean(row["tflop"]) * 1e3, np.mean(row["reward"]), np.mean(row["right"]), *cells]
            shown = [f"{cells[0]:.1f}", f"{cells[1]:.2f}", f"{cells[2]:.2f}", *cells[3:]]
            print(f"| {title} | {name or 'none'} | {row['started']} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
