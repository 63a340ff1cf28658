"""Seeded faults, one at a time: which of them do the fast tests catch?

    python tools/mutants.py                    # all of them; a table, exit code 1 where one survives
    python tools/mutants.py --only ledger -j 2
    python -m tools.mutants --check            # part of `make lint`: is each line still there?

A mutant is one line of the package changed: a charge dropped, the wrong half kept, rows swapped in a merge, a halving
skipped, a lock forgotten, a seed ignored. The tests that are named with it run on a copy of the tree, and stop at the
first that fails. A mutant that no longer applies, because the line has changed, is an error: seed it again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 240.0  # seconds; a mutant that hangs is seen


class Mutant(NamedTuple):
    """A fault: in a file of the package, what stands there and what it becomes, and the tests that must see it."""

    name: str
    file: str
    line: str
    becomes: str
    tests: str

    @property
    def applies(self) -> bool:
        """Whether the line is there."""
        return self.line in (ROOT / "src" / "ttsnap" / self.file).read_text(encoding="utf-8")


LEDGER, DRIVER = (
    "tests/core/test_ledger.py tests/core/test_cost.py",
    "tests/core/test_ledger.py tests/core/test_observers.py",
)
FORKS = "tests/policies/test_forking.py tests/live/test_forks.py"
SETS, DRAFTS = "tests/live/test_sets.py", "tests/live/test_drafts.py"
POLICY, REPLAY = "tests/policies", "tests/replay/test_accounting.py tests/replay/test_simulator.py"
ENGINE = "tests/live/test_engine.py tests/live/test_stream.py"
BATCHES, SAMPLER = "tests/pipelines/test_batching.py", "tests/pipelines/test_sampler.py"
RECORDS = "tests/recordings/test_recording.py tests/recordings/test_recorder.py"

MUTANTS = (
    # The ledger and costs.
    Mutant(
        "ledger: looks are free",
        "core/cost.py",
        "looks[:, -1 if move.draft else move.step - 1] += move.mask.sum(axis=1)",
        "pass",
        LEDGER,
    ),
    Mutant(
        "ledger: drafts are free",
        "core/cost.py",
        "calls = self.drafts + self.lost + self.again",
        "calls = self.lost + self.again",
        DRAFTS,
    ),
    Mutant(
        "ledger: a draft moves its candidate",
        "core/cost.py",
        "            elif not move.draft:\n",
        "            else:\n",
        DRAFTS,
    ),
    Mutant(
        "engine: a draft takes its candidate's place",
        "live/engine.py",
        "                if not owner.drafts:\n",
        "                if True:\n",
        DRAFTS,
    ),
    Mutant(
        "ledger: a child pays for its parent",
        "core/cost.py",
        "calls = calls + np.where(where, step - position, 0).sum(axis=1)",
        "calls = calls + np.where(where, step, 0).sum(axis=1)",
        FORKS,
    ),
    Mutant(
        "driver: a child is worth nothing yet",
        "core/driver.py",
        "seen.append((query.children, query.from_parents(_latest(seen))))",
        "pass",
        FORKS,
    ),
    Mutant(
        "forks: noise grows", "pipelines/forks.py", "(math.cos(angle) - 1) * noise", "math.cos(angle) * noise", FORKS
    ),
    Mutant(
        "forks: a place has the same child every time",
        "live/engine.py",
        "self.begun[place, step] += 1",
        "self.begun[place, step] += 0",
        FORKS,
    ),
    Mutant(
        "forks: who goes back stays where the parent was",
        "core/grid.py",
        "return self.step - self.back",
        "return self.step",
        FORKS,
    ),
    Mutant(
        "forks: a solver remembers steps that were not made",
        "pipelines/call.py",
        'state |= {name: value for name, value in (("lower_order_nums", 0), ("last_sample", None)) if name in state}',
        "pass",
        FORKS,
    ),
    Mutant(
        "rollover: nothing is saved",
        "policies/rollover.py",
        "left = left + own",
        "left = np.zeros_like(left) + own",
        FORKS,
    ),
    Mutant("sets: distance does not count", "live/sets.py", "gain = good + weight *", "gain = good + 0 *", SETS),
    Mutant(
        "forks: ancestors are forgotten",
        "live/engine.py",
        "(*self.lineage.get(parent, ()), turn)",
        "(turn,)",
        FORKS,
    ),
    Mutant(
        "ledger: lost calls are free",
        "core/cost.py",
        "calls = self.drafts + self.lost + self.again",
        "calls = self.drafts + self.again",
        LEDGER,
    ),
    Mutant(
        "ledger: asking again is charged",
        "core/cost.py",
        "new = mask & (position < step)",
        "new = mask & (position <= step)",
        LEDGER,
    ),
    Mutant("ledger: stopped moves stay", "core/cost.py", "_replace(mask=answered)", "_replace()", f"{DRIVER} {ENGINE}"),
    Mutant(
        "cost: a plan's prompt is free",
        "core/cost.py",
        "seconds, tflop = 0.0, text",
        "seconds, tflop = 0.0, 0.0",
        LEDGER,
    ),
    Mutant(
        "cost: previews are decodes",
        "core/cost.py",
        'decodes += many if look.source == "full" else 0',
        "decodes += many",
        f"{LEDGER} tests/pipelines/test_previews.py",
    ),
    Mutant(
        "budget: one candidate more", "core/cost.py", "    return low\n", "    return high\n", "tests/core/test_cost.py"
    ),
    # Rankings, driver, policies.
    Mutant(
        "blank pictures: they may win",
        "core/ranking.py",
        "np.where(blank, values - (highest - lowest + 1), values)",
        "np.where(blank, values, values)",
        "tests/live/test_engine.py",
    ),
    Mutant(
        "ranking: ties to the higher index",
        "core/ranking.py",
        "best = np.argmax(np.where(np.isnan(dense), -np.inf, dense), axis=1)",
        "best = dense.shape[1] - 1 - np.argmax(np.where(np.isnan(dense), -np.inf, dense)[:, ::-1], axis=1)",
        "tests/core/test_ranking.py",
    ),
    Mutant(
        "ranking: the worst survive",
        "core/ranking.py",
        "threshold = np.partition(dense, -size, axis=1)[:, -size, None]\n    best = dense >= threshold",
        "threshold = np.partition(dense, size - 1, axis=1)[:, size - 1, None]\n    best = dense <= threshold",
        f"tests/core/test_ranking.py {POLICY}",
    ),
    Mutant(
        "ranking: NaN wins",
        "core/ranking.py",
        "np.where(np.isnan(values), np.inf, -values)",
        "np.where(np.isnan(values), -np.inf, -values)",
        "tests/core/test_ranking.py",
    ),
    Mutant(
        "ranking: weights are ignored",
        "core/ranking.py",
        "rewards @ _weights(self.weights, rewards), np.nan)",
        "rewards.sum(axis=-1), np.nan)",
        "tests/core/test_ranking.py tests/live/test_reporting.py",
    ),
    Mutant(
        "driver: any reward will do",
        "core/driver.py",
        "            check(environment, new, observed, query.step)\n",
        "",
        f"{DRIVER} {POLICY}",
    ),
    Mutant(
        "driver: the first finished wins",
        "core/driver.py",
        "chosen = choose(combine(final, finished), finished)",
        "chosen = np.argmax(finished, axis=1)",
        f"{POLICY} {DRIVER}",
    ),
    Mutant(
        "halving: one more survives",
        "policies/successive_halving.py",
        "return min(size, max(self.least, round(self.keep[index] * size)))",
        "return min(size, max(self.least, round(self.keep[index] * size) + 1))",
        POLICY,
    ),
    Mutant(
        "halving: a rung is skipped",
        "policies/successive_halving.py",
        "for index, step in steps_of(self.rungs, num_steps):",
        "for index, step in steps_of(self.rungs[1:], num_steps):",
        POLICY,
    ),
    # The engine.
    Mutant(
        "engine: lost calls are forgotten",
        "live/engine.py",
        "lost[place[0]] += call.progress.paid - search.begun[place]",
        "pass",
        ENGINE,
    ),
    Mutant(
        "engine: rewards of another row",
        "live/engine.py",
        "owner.answer[place] = values[row]",
        "owner.answer[place] = values[rows[0]]",
        ENGINE,
    ),
    Mutant(
        "engine: a failed reward takes all",
        "live/engine.py",
        "            if error is not None:\n                owner.end(error=error)\n                continue\n",
        "            if any(errors):\n                owner.end(error=ValueError())\n                continue\n",
        ENGINE,
    ),
    Mutant(
        "engine: batches beyond the limit",
        "pipelines/running.py",
        "part := group[: self.limits.of(self.kind(group[0]))]",
        "part := group",
        f"{SAMPLER} {ENGINE}",
    ),
    Mutant(
        "limits: nothing is halved",
        "pipelines/limits.py",
        "self._own[kind] = max(1, size // 2)",
        "self._own[kind] = max(1, size - 1)",
        f"{SAMPLER} {ENGINE}",
    ),
    # Batches and calls.
    Mutant(
        "batching: rows one after another",
        "pipelines/batching.py",
        "for part in parts], 1).flatten(0, 2)",
        "for part in parts], 0).flatten(0, 2)",
        BATCHES,
    ),
    Mutant(
        "batching: a shared value that was changed in place is taken for the old one",
        "pipelines/batching.py",
        "if tree[name] is not tensor or tensor._version != version:",
        "if tree[name] is not tensor:",
        BATCHES,
    ),
    Mutant(
        "batching: answers in another order",
        "pipelines/batching.py",
        "return list(answer.chunk(count))",
        "return list(answer.chunk(count))[::-1]",
        BATCHES,
    ),
    Mutant(
        "batching: shared values may differ",
        "pipelines/batching.py",
        "return values.number(tree)",
        "return tree.dtype, tree.shape",
        BATCHES,
    ),
    Mutant(
        "batching: a mask of ones",
        "pipelines/batching.py",
        "tree[mask] = torch.nn.functional.pad(words, (0, missing))",
        "tree[mask] = torch.nn.functional.pad(words, (0, missing), value=1)",
        BATCHES,
    ),
    Mutant(
        "call: every seed is 0",
        "pipelines/running.py",
        'generator = torch.Generator("cpu").manual_seed(seed)',
        'generator = torch.Generator("cpu").manual_seed(0)',
        SAMPLER,
    ),
    Mutant(
        "call: random states are shared",
        "pipelines/call.py",
        "torch.set_rng_state(self.random[0])",
        "pass",
        f"{SAMPLER} tests/pipelines/test_schedulers.py",
    ),
    Mutant(
        "call: arguments are shared",
        "pipelines/call.py",
        "            return value.clone()\n",
        "            return value\n",
        SAMPLER,
    ),
    Mutant(
        "decoder: black pictures pass",
        "pipelines/running.py",
        'if ask.method != "decode" or not _infinite(answer):',
        "if True:",
        SAMPLER,
    ),
    Mutant(
        "standing: the scheduler's state is lost",
        "pipelines/call.py",
        "state = state_of(last.scheduler)",
        "state = None",
        SAMPLER,
    ),
    # Recordings and replay.
    Mutant(
        "recording: a missing reward is stored",
        "recordings/recording.py",
        "if not np.isfinite(clean[:, :, -1]).all():",
        "if False:",
        RECORDS,
    ),
    Mutant(
        "recording: clean rewards first",
        "recordings/recording.py",
        '(("seed", seeds), ("aware", aware), ("clean", clean))',
        '(("clean", clean), ("seed", seeds), ("aware", aware))',
        RECORDS,
    ),
    Mutant(
        "replay: another draw per policy",
        "replay/simulator.py",
        "np.random.default_rng([seed, int(prompt)])",
        "np.random.default_rng()",
        REPLAY,
    ),
    # Rewards.
    Mutant(
        "noise-aware: one level for all",
        "rewards/noise_aware.py",
        "return min(self.sigmas, key=lambda known: abs(known - sigma))",
        "return self.sigmas[0]",
        "tests/rewards/test_noise_aware.py",
    ),
    Mutant(
        "noise-aware: noisy weights judge finished images",
        "rewards/noise_aware.py",
        "if sigma < self.sigmas[0] * (1 - 1e-6):",
        "if sigma < 0:",
        "tests/rewards/test_noise_aware.py",
    ),
    Mutant(
        "reward: any shape will do",
        "live/judging.py",
        "if values.shape not in ((count,), (count, 1)) and not (count == 1 and values.shape == ()):",
        "if False:",
        f"{ENGINE} tests/live/test_search.py",
    ),
    Mutant(
        "judging: the first half again",
        "live/judging.py",
        "return judge(name, reward, seen[rows], prompts[rows], sigma)",
        "return judge(name, reward, seen[rows], prompts[: len(prompts[rows])], sigma)",
        ENGINE,
    ),
    # Files.
    Mutant(
        "files: written in place",
        "files/storage.py",
        "os.replace(temporary, path)",
        "path.write_bytes(temporary.read_bytes())",
        "tests/files/test_storage.py",
    ),
    Mutant(
        "files: no lock",
        "files/locks.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "tests/files/test_locks.py",
    ),
    Mutant(
        "resume: another reward goes on",
        "live/settings.py",
        "{name: fingerprint(path) for name, path in files.items() if path.exists()}",
        "{}",
        "tests/robustness",
    ),
)


def run(mutant: Mutant) -> tuple[str, float]:
    """`caught`, `SURVIVED` or `does not apply`, and the seconds that it took."""
    start = time.perf_counter()
    if not mutant.applies:
        return "does not apply", 0.0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        skipped = shutil.ignore_patterns(
            ".git", ".venv", "__pycache__", "demo", "out", "runs", "*.egg-info", ".*_cache", ".hypothesis"
        )
        shutil.copytree(ROOT, copy, ignore=skipped)
        broken = copy / "src" / "ttsnap" / mutant.file
        broken.write_text(broken.read_text(encoding="utf-8").replace(mutant.line, mutant.becomes), encoding="utf-8")
        if (ROOT.parent / "shared").is_dir():
            (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
        surroundings = os.environ | {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, cwd=copy, env=surroundings, capture_output=True, text=True, timeout=LONGEST)
        except subprocess.TimeoutExpired:
            return "caught", LONGEST
    return {0: "SURVIVED", 1: "caught"}.get(
        done.returncode, f"pytest ended with {done.returncode}"
    ), time.perf_counter() - start


def main() -> None:
    """Run them, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a mutant's name")
    parser.add_argument("--since", default="", help="the name of the first to run")
    parser.add_argument("-j", type=int, default=os.cpu_count() or 1, help="at a time")
    parser.add_argument("--check", action="store_true", help="run nothing; do all apply?")
    asked = parser.parse_args()
    if asked.check:
        if gone := [mutant.name for mutant in MUTANTS if not mutant.applies]:
            sys.exit(f"tools/mutants.py: the line has changed of {', '.join(gone)}; seed it again")
        return
    names = [mutant.name for mutant in MUTANTS]
    first = names.index(asked.since) if asked.since else 0
    chosen = [mutant for mutant in MUTANTS[first:] if asked.only in mutant.name]
    with ThreadPoolExecutor(asked.j) as pool:
        outcomes = []
        for mutant, (outcome, seconds) in zip(chosen, pool.map(run, chosen), strict=True):
            outcomes.append(outcome)
            print(f"{outcome:<16} {seconds:5.0f} s  {mutant.name}", flush=True)
    print(f"{outcomes.count('caught')} of {len(outcomes)} caught")
    sys.exit(outcomes.count("caught") != len(outcomes))


if __name__ == "__main__":
    main()
