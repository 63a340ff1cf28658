"""Other ways to train a noise-aware reward of decoded x0 estimates, against the curriculum, on held-out prompts.

    ttsnap record --prompts shapes:train --prompt-range 0:160 --per-prompt 8 --calls 1,3,5,7,9,20 --out train
    ttsnap label train train.zarr --reward shapes --final-only
    ttsnap record --prompts shapes:held-out --prompt-range 0:60 --per-prompt 16 --seed 9000000 \
        --calls 1,3,5,7,9,20 --out held
    ttsnap label held held.zarr --reward shapes
    ttsnap record --reward shapes-aware --prompts shapes:held-out --prompt-range 0:60 --per-prompt 16 --seed 9000000 \
        --calls 1,2,3,4,5,6,7,8,9,20 --out aware.zarr
    python benchmarks/ablations.py --train train train.zarr --held-out held held.zarr --aware aware.zarr

Every way starts from the clean reward, sees the same images the same number of times and is trained in full. Kendall's
tau with the finished image's reward, by call; gains over the clean reward and over the curriculum are means over all
calls that were learnt, with 95 % intervals (bootstrap over prompts). One run each: the spread between seeds is not in
the intervals (--seed makes another run).
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from torch import nn

from ttsnap.recordings import Recording
from ttsnap.rewards.trainable import adapt
from ttsnap.shapes.reward import load_reward, soft_minimum
from ttsnap.training.data import Data
from ttsnap.training.evaluation import kendall_tau
from ttsnap.training.losses import squared_error

BATCH, RATE, TEMPERATURE = 64, 5e-4, 0.5


class OfOneLevel(nn.Module):
    """The clean reward, finetuned."""

    def __init__(self):
        super().__init__()
        self.reward = load_reward()
        self.trained = list(adapt(self.reward, "full", 0, 0).values())

    def forward(self, images, prompts, sigma):
        return self.reward(images, prompts)


class ToldSigma(OfOneLevel):
    """One network for all levels: sigma scales and shifts its features at two places, by nothing at first."""

    def __init__(self):
        super().__init__()
        self.read = nn.Sequential(nn.Linear(16, 32), nn.GELU())
        self.places = nn.ModuleList([nn.Linear(32, 80), nn.Linear(32, 128)])
        for place in self.places:
            nn.init.zeros_(place.weight)
            nn.init.zeros_(place.bias)
        self.trained += [*self.read.parameters(), *self.places.parameters()]

    def forward(self, images, prompts, sigma):
        angles = sigma * math.pi * torch.arange(8)
        told = self.read(torch.cat([angles.cos(), angles.sin()]))
        scale, shift = self.places[0](told)[:, None, None].chunk(2)
        stem = self.reward.network.stem
        cells = stem[5:](stem[:5](images * 4 - 1) * (1 + scale) + shift).flatten(2).transpose(1, 2)
        scale, shift = self.places[1](told).chunk(2)
        return soft_minimum(self.reward.judge(cells * (1 + scale) + shift, prompts))


def pairwise(rewards, targets, prompts):
    """Bradley-Terry over all pairs of a prompt: the ranking and nothing else."""
    same = torch.tensor([[a == b for b in prompts] for a in prompts])
    better = (targets[:, None] - targets).sign()
    chosen = same & (better != 0)
    differences = (rewards[:, None] - rewards)[chosen] / TEMPERATURE
    return nn.functional.binary_cross_entropy_with_logits(differences, better[chosen] / 2 + 0.5)


class Experiment:
    """Data, and how one update is made."""

    def __init__(self, data, test, updates, seed):
        self.data, self.test, self.updates, self.seed = data, test, updates, seed
        self.calls = [call for call in data.tree.calls if call < data.tree.num_steps]
        self.mean, self.std = data.targets.mean(), data.targets.std()
        self.kept = {call: {} for call in self.calls}

    def images(self, data, rows, call):
        """[n, 3, h, w] in 0..1, read once."""
        key = id(data)
        if key not in self.kept[call]:
            everybody = np.argwhere(np.ones_like(data.targets, dtype=bool))
            self.kept[call][key] = data.images(everybody, call)
        return torch.from_numpy(self.kept[call][key][rows]).permute(0, 3, 1, 2).float() / 255

    def batch(self, rng, call):
        """Candidates of whole prompts: images, prompts, targets in standard deviations."""
        prompts, size = self.data.targets.shape
        chosen = rng.choice(prompts, BATCH // size, replace=False)
        rows = (chosen[:, None] * size + np.arange(size)).ravel()
        texts = [self.data.tree.prompts[self.data.rows[p]] for p in chosen for _ in range(size)]
        targets = torch.from_numpy((self.data.targets[chosen].ravel() - self.mean) / self.std).float()
        return self.images(self.data, rows, call), texts, targets

    def sigma(self, call):
        return self.data.tree.sigmas[call - 1]

    def train(self, model, calls, loss_of, replay=0.0):
        """`updates` for each of `calls`, in random order; part `replay` of them goes to cleaner levels instead."""
        rng, total = np.random.default_rng(self.seed), self.updates * len(calls)
        cleaner = [call for call in self.calls if call > max(calls)]
        optimiser = torch.optim.AdamW(model.trained, RATE, weight_decay=0.01)
        model.train()
        for update in range(total):
            call = int(rng.choice(cleaner if cleaner and rng.random() < replay else calls))
            warm = min(1.0, (update + 1) / (0.1 * total))
            for group in optimiser.param_groups:
                group["lr"] = RATE * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * update / total)))
            images, texts, targets = self.batch(rng, call)
            found = (model(images, texts, self.sigma(call)) - self.mean) / self.std
            optimiser.zero_grad()
            loss_of(found, targets, texts).backward()
            nn.utils.clip_grad_norm_(model.trained, 1.0)
            optimiser.step()

    def taus(self, model, call):
        """On held-out prompts [prompts]."""
        model.eval()
        rows = np.arange(self.test.targets.size)
        texts = [self.test.tree.prompts[p] for p in self.test.rows for _ in range(self.test.targets.shape[1])]
        with torch.no_grad():
            parts = [
                model(self.images(self.test, part, call), [texts[i] for i in part], self.sigma(call))
                for part in np.array_split(rows, -(-len(rows) // BATCH))
            ]
        return kendall_tau(torch.cat(parts).double().numpy().reshape(self.test.targets.shape), self.test.targets)

    def curriculum(self, loss_of, replay=0.0):
        """Level by level, clean to noisy, each from the last one's weights [calls, prompts]."""
        torch.manual_seed(self.seed)
        model, found = OfOneLevel(), {}
        for call in sorted(self.calls, reverse=True):
            self.train(model, [call], loss_of, replay)
            found[call] = self.taus(model, call)
        return np.stack([found[call] for call in self.calls])

    def at_once(self, loss_of):
        """All levels by one network [calls, prompts]."""
        torch.manual_seed(self.seed)
        model = ToldSigma()
        self.train(model, self.calls, loss_of)
        return np.stack([self.taus(model, call) for call in self.calls])


def interval(by_prompt, rng):
    """Mean and its 95 % interval, as text."""
    by_prompt = by_prompt[np.isfinite(by_prompt)]
    means = by_prompt[rng.integers(len(by_prompt), size=(4000, len(by_prompt)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{by_prompt.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs=2, required=True, metavar=("TREE", "LABELS"))
    parser.add_argument("--held-out", nargs=2, required=True, metavar=("TREE", "LABELS"))
    parser.add_argument("--aware", help="a recording of the held-out candidates with a noise-aware reward, to compare")
    parser.add_argument("--updates", type=int, default=100, help=f"of {BATCH} images, for each level")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    data, test = Data.open(*a.train, "shapes"), Data.open(*a.held_out, "shapes")
    assert not {data.tree.prompts[p] for p in data.rows} & {test.tree.prompts[p] for p in test.rows}
    trial = Experiment(data, test, a.updates, a.seed)

    def mse(found, targets, prompts):
        return squared_error(found, targets, torch.ones_like(found)) / len(found)

    ways = {
        "curriculum, squared error (the paper's)": lambda: trial.curriculum(mse),
        "one network that is told sigma": lambda: trial.at_once(mse),
        "curriculum, half of the updates from cleaner levels": lambda: trial.curriculum(mse, replay=0.5),
        "curriculum, ranking loss alone": lambda: trial.curriculum(pairwise),
    }
    clean = np.stack([trial.taus(OfOneLevel(), call) for call in trial.calls])
    rng, base = np.random.default_rng(0), None
    print(f"{data.targets.size} trajectories to learn, {a.updates} updates per level; {test.targets.shape} held out\n")
    print("| | " + " | ".join(map(str, trial.calls)) + " | gain over clean | minus curriculum | seconds |")
    print("|---" * (len(trial.calls) + 4) + "|")
    print("| clean reward | " + " | ".join(f"{tau:.2f}" for tau in np.nanmean(clean, axis=1)) + " | | | |", flush=True)

    def row(name, found, seconds):
        cells = [f"{tau:.2f}" for tau in np.nanmean(found, axis=1)] + [interval((found - clean).mean(0), rng)]
        cells += ["" if base is None or found is base else interval((found - base).mean(0), rng), seconds]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)

    for name, way in ways.items():
        start = time.perf_counter()
        found = way()
        base = found if base is None else base
        row(name, found, f"{time.perf_counter() - start:.0f}")
    if a.aware:
        recording = Recording.open(a.aware)
        rows = recording.recorded()
        if not np.array_equal(recording.seeds[rows], test.tree.seeds[test.rows]):
            parser.error(f"{a.aware} is not of the candidates of {a.held_out[0]}")
        column = recording.rewards.index("shapes")
        served = [np.asarray(kind[rows, ..., column], float) for kind in (recording.aware, recording.clean)]
        looks = np.where(np.isnan(served[0]), served[1], served[0])
        taus = [kendall_tau(looks[..., call - 1], test.targets) for call in trial.calls]
        row("shapes-aware, as served (features, other training)", np.stack(taus), "")


if __name__ == "__main__":
    main()
