# %% [markdown]
# The whole story on the embedded model, on two cores: trajectories -> labels -> a noise-aware reward -> a tuned
# schedule -> pictures, and the curve of reward against budget.
#
#     python examples/whole_story.py [SCALE]
#
# SCALE 1 (the default) takes about ten minutes on two quiet cores (measured: 611 s); .02 shows the mechanics in one.

# %%
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ttsnap.core.cost import parse_budgets
from ttsnap.files.figures import save
from ttsnap.live.session import load_sampler, prepare
from ttsnap.recordings.recorder import record_rewards, seeds_of
from ttsnap.replay import Contender, EveryCall, cost_model_of, plots, simulate, tune
from ttsnap.shapes import foresight
from ttsnap.shapes.scenes import held_out_prompts, train_prompts

sys.path.append(str(Path(__file__).parents[1]))
from tools.shapes.foresight import distil, train, trajectories

scale = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
out = Path("out") / "whole_story"
start = time.perf_counter()


def share(count: int, least: int) -> int:
    """A number of the full story, or so much of it."""
    return max(least, round(scale * count))


def tell(text: str) -> None:
    """Say what goes on."""
    print(f"{time.perf_counter() - start:5.0f} s  {text}", flush=True)


# %% [markdown]
# Record and label: candidates of training prompts run to the end; of every call the denoiser's features and the x0
# estimate are kept, and the clean reward judges the finished image. Nothing else is decoded.

# %%
trails = trajectories(share(5000, 64))
count = trails.targets.shape[0] * trails.targets.shape[1]
tell(f"{count} trajectories, clean reward {trails.targets[..., 0].mean():.2f}")

# %% [markdown]
# Train: the student learns to see what the reward sees, then both learn to foretell the finished image.

# %%
torch.manual_seed(0)
model = foresight.begin()
distil(model, trails, updates=share(600, 12), images=share(6400, 128), tell=tell)
model = train(model, trails, updates=share(300, 10), tell=tell)
foresight.save(model, out / "head", sigma=0.75, trained={"script": "examples/whole_story.py", "scale": scale})
judges = {"aware": foresight.load_foresight(folder=out / "head")}

# %% [markdown]
# Tune: rewards of other prompts are recorded, with both guides and what their looks cost; each guide gets its schedule.

# %%
prompts = train_prompts()[900 : 900 + share(40, 8)]
recording = record_rewards(
    load_sampler("shapes", max_batch=64),
    judges,
    prompts,
    seeds_of(range(900, 900 + len(prompts)), 16, 90_000_000),
    out / f"tuning-{scale:g}-{int(time.time())}.zarr",
    settings={"model": "shapes"},
)
budgets, accounting = parse_budgets("3.5:7.5:1GFLOP"), EveryCall(cost_model_of(recording))
tuned = {}
for guide in ("aware", "clean"):
    tuning = tune(recording, budgets, accounting, guide=guide, folds=2, trials=share(600, 40))
    tuning.save(out / f"{guide}.json")
    tuned[guide] = tuning.policy
    tell(f"{guide} guide: {tuning.policy}; {tuning.sentence}")

# %% [markdown]
# Generate: held-out prompts, each with its pruning board and what best-of-N makes of the same budget.

# %%
searcher = prepare("shapes", reward=judges, budget="5GFLOP", policy=tuned["aware"])
for number, result in enumerate(searcher.block(held_out_prompts()[:4], compare=True)):
    result.save(out / f"picture{number}")
    others = f"best-of-{result.best_of_n.candidates} {result.best_of_n.best.reward:.2f}"
    tell(f"{result.prompt}: reward {result.reward:.2f}, {others}; {out / f'picture{number}' / 'board.png'}")

# %% [markdown]
# The curve: both guides with their schedules, and best-of-N.

# %%
field = [Contender(name, tuned[kind], kind) for name, kind in (("TTSnap", "aware"), ("TTSp", "clean"))]
simulation = simulate(recording, field, budgets, accounting)
print(simulation.summary[["policy", "relative_increase_percent", "compute_multiplier"]])
for guide, correlation in plots.correlations(recording).items():
    print(*guide, np.round(correlation.mean(axis=0), 2))
print(*save(plots.plot(simulation, recording), out), sep="\n")
tell("done")
