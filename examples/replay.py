# %% [markdown]
# From recorded rewards to a tuned schedule and its curve, in two minutes on two cores.
#
#     python examples/replay.py VALUES [REWARD]
#
# VALUES is a folder of published reward values (`flux_hps_val_base/p200_i200_s00.yaml`, ...) or a recording that
# `ttsnap record --reward` or `ttsnap label` made.

# %%
import sys
from pathlib import Path

import numpy as np

from ttsnap.core.cost import parse_budgets
from ttsnap.files.figures import save
from ttsnap.policies import SuccessiveHalving
from ttsnap.recordings import Recording
from ttsnap.recordings.published_values import import_values
from ttsnap.replay import Contender, EveryCall, cost_model_of, plots, simulate, tune

source = Path(sys.argv[1] if len(sys.argv) > 1 else "values")
reward = sys.argv[2] if len(sys.argv) > 2 else "hps"
out = Path("out") / "replay"

# %% [markdown]
# A recording is an xarray dataset on zarr with dims (prompt, candidate, step, reward).

# %%
if (source / "zarr.json").exists():
    recording = Recording.open(source)
else:
    recording = import_values(source, out / f"{reward}.zarr", rewards=[reward], overwrite=True)
print(recording)
print(recording.dataset)

# %% [markdown]
# How well does each look rank the candidates as they will be ranked in the end?

# %%
for (guide, name), correlation in plots.correlations(recording).items():
    print(f"{name}, {guide} guide:", np.round(correlation.mean(axis=0), 2))

# %% [markdown]
# Every call, decode and look is charged. Budgets: what best-of-2, -3, ... -20 cost.

# %%
accounting = EveryCall(cost_model_of(recording))
one = accounting.model.call_tflop * recording.shape[2] + accounting.model.decode_tflop + accounting.model.look_tflop
budgets = parse_budgets(f"{2.01 * one}:{20.01 * one}:{one}TFLOP")

# %% [markdown]
# Fit a schedule on the even prompts; report it on the odd ones.

# %%
prompts = recording.recorded()
tuning = tune(recording, budgets, accounting, fit=prompts[::2], test=prompts[1::2])
print(tuning.policy)
print(tuning.sentence)
tuning.save(out / "tuned.json")

# %% [markdown]
# The curve, on the odd prompts, beside the published schedule.

# %%
field = [
    Contender("tuned", tuning.policy),
    Contender("published schedule", SuccessiveHalving((3, 7, 12), (0.4, 0.4, 0.5))),
]
if recording.has_aware:
    field.append(Contender("published schedule, clean guide", field[1].policy, "clean"))
simulation = simulate(recording, field, budgets, accounting, prompts=prompts[1::2])
columns = ["policy", "relative_increase_percent", "relative_increase_ci95", "compute_multiplier"]
print(simulation.summary[columns].to_string())
print(*save(plots.plot(simulation, recording), out), sep="\n")
