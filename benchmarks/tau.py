"""How well looks rank the candidates of a prompt: Kendall's tau-b with the finished image's reward, call by call.

    ttsnap record --reward shapes-aware --prompts shapes:held-out --prompt-range 0:60 --per-prompt 16 --seed 9000000 \
        --calls 1,2,3,4,5,6,7,8,9,20 --out held.zarr
    python benchmarks/tau.py held.zarr                # prints the table of docs/noise-aware.md as Markdown

The noise-aware reward as it is served: where it has no value, the clean reward looks. Gains are means over some calls
of tau less the clean reward's. Intervals: 95 %, bootstrap over prompts.
"""

from __future__ import annotations

import argparse

import numpy as np

from equal_cost import halfwidth
from ttsnap.recordings import Recording
from ttsnap.training.evaluation import kendall_tau


def taus(recording, reward):
    """Kendall's tau [prompts, calls] of the clean and of the served reward, and the calls."""
    rows, column = recording.recorded(), recording.rewards.index(reward)
    clean, aware = (values[rows, ..., column].astype(float) for values in (recording.clean, recording.aware))
    served = np.where(np.isnan(aware), clean, aware)
    calls = [c for c in range(1, clean.shape[2]) if not np.isnan(clean[..., c - 1]).any()]
    found = [[kendall_tau(values[..., c - 1], clean[..., -1]) for c in calls] for values in (clean, served)]
    return np.moveaxis(np.array(found), 1, 2), calls


def gain(both, calls, first, last, rng):
    """Mean gain over calls first..last and its interval."""
    chosen = [first <= call <= last for call in calls]
    by_prompt = (both[1] - both[0])[:, chosen].mean(1)
    by_prompt = by_prompt[np.isfinite(by_prompt)]
    means = by_prompt[rng.integers(len(by_prompt), size=(4000, len(by_prompt)))].mean(1)
    return by_prompt.mean(), *np.percentile(means, [2.5, 97.5])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", help="made with a noise-aware reward")
    parser.add_argument("--reward", help="name of the clean reward (default: the first)")
    parser.add_argument("--spans", default="1:6,4:9", help="calls over which the gain is averaged")
    a = parser.parse_args()
    recording = Recording.open(a.recording)
    both, calls = taus(recording, a.reward or recording.rewards[0])
    print(f"{both.shape[1]} prompts x {recording.shape[1]} candidates\n")
    print("\n".join(["| call | " + " | ".join(map(str, calls)) + " |", "|---" * (len(calls) + 1) + "|"]))
    rng = np.random.default_rng(0)
    for name, values in zip(("clean", "noise-aware, as served"), both, strict=True):
        columns = [column[np.isfinite(column)] for column in values.T]
        cells = [(column.mean(), halfwidth(column, rng)) for column in columns]
        print(f"| {name} | " + " | ".join(f"{mean:.2f} ± {half:.2f}" for mean, half in cells) + " |")
    print()
    rng = np.random.default_rng(0)
    for first, last in (map(int, span.split(":")) for span in a.spans.split(",")):
        mean, low, high = gain(both, calls, first, last, rng)
        print(f"gain over calls {first} to {last}: {mean:+.3f} ({low:+.3f} to {high:+.3f})")


if __name__ == "__main__":
    main()
