"""Where the time of searches goes, measured against the stock pipeline's best-of-N for as many denoiser calls.

All are run by turns, so that what else the machine does strikes all alike; the first turn warms up and is not counted.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.core.driver import run
from ttsnap.core.grid import Policy
from ttsnap.live.engine import Clock, Engine, wait
from ttsnap.policies import BestOfN

if TYPE_CHECKING:
    from torch import Tensor

    from ttsnap.live.session import Session
    from ttsnap.pipelines.sampler import Sampler

STOCK = "stock best-of-N"
OURS = "best-of-N"


@dataclass(frozen=True)
class Speed:
    """What one way to a picture takes; medians over turns.

    Attributes:
        name: the policy, or the stock pipeline.
        candidates: started.
        calls: denoiser calls, summed over candidates.
        seconds: from prompt to the judged picture.
        per_call: its seconds per denoiser call over those of the stock pipeline: of the same turn, decodes and looks
            included on both sides.
        per_call_range: the least and the largest.
        occupancy: mean share of a denoiser call's places that were used; None for the stock pipeline.
        shares: of a timed search's seconds: calls, decodes, previews, looks, and all else; None for the stock pipeline.
        overhead: its seconds over those of its bare denoiser calls.
        peak: MiB beyond what was there before, at most; None where that cannot be told.
    """

    name: str
    candidates: int
    calls: int
    seconds: float
    per_call: float
    per_call_range: tuple[float, float]
    occupancy: float | None
    shares: dict[str, float] | None
    overhead: float | None
    peak: float | None


def measure(
    session: Session,
    searches: Mapping[str, Policy],
    prompt: str,
    candidates: int,
    repeats: int = 5,
    on_turn: Callable[[], None] = lambda: None,
) -> list[Speed]:
    """The stock pipeline's best-of-N, the sampler's, and searches.

    Args:
        session: model and rewards.
        searches: policies by name.
        prompt: what is painted.
        candidates: that each search starts. Best-of-N makes as many images as the first one's calls pay for.
        repeats: turns that count.
        on_turn: called after each turn.
    """
    sampler, steps = session.sampler, session.sampler.num_steps
    seeds = np.arange(candidates)[None]
    counted = {name: int(_search(session, policy, prompt, seeds)[0].ledger.nfe[0]) for name, policy in searches.items()}
    images = max(1, round(next(iter(counted.values())) / steps))
    started = {STOCK: images, OURS: images} | dict.fromkeys(searches, candidates)
    calls = {STOCK: images * steps, OURS: images * steps} | counted
    ours: dict[str, Policy] = {OURS: BestOfN(), **searches}
    works: dict[str, Callable[[], Any]] = {STOCK: lambda: stock_best_of_n(session, prompt, images)}
    for name, policy in ours.items():
        works[name] = partial(_search, session, policy, prompt, np.arange(started[name])[None])
    took, peaks = in_turns(works, sampler.device, repeats + 1, on_turn)
    took = {name: values[1:] for name, values in took.items()}
    found = []
    for name in works:
        ratios = took[name] / calls[name] / (took[STOCK] / calls[STOCK])
        occupancy, shares = _inside(session, ours[name], prompt, started[name]) if name in ours else (None, None)
        found.append(
            Speed(
                name,
                started[name],
                calls[name],
                float(np.median(took[name])),
                float(np.median(ratios)),
                (float(ratios.min()), float(ratios.max())),
                occupancy,
                shares,
                None if shares is None else 1 / shares["calls"],
                peaks[name],
            )
        )
    return found


def _search(
    session: Session, policy: Policy, prompt: str, seeds: Any, clock: Clock | None = None
) -> tuple[Any, Engine]:
    """A search from its prompt on: nothing is remembered of an earlier one."""
    session.sampler.forget_prompts()
    engine = session.engine()
    engine.clock = clock
    grid = engine.grid([prompt], seeds)
    return run(policy, grid, session.combine), engine


def _inside(session: Session, policy: Policy, prompt: str, candidates: int) -> tuple[float, dict[str, float]]:
    """Occupancy of a search and how its seconds divide; its clock waits for the device, so it is not timed itself."""
    clock, device = Clock(), session.sampler.device
    wait(device)
    start = time.perf_counter()
    _, engine = _search(session, policy, prompt, np.arange(candidates)[None], clock)
    wait(device)
    wall = time.perf_counter() - start
    parts = {name: getattr(clock, name) / wall for name in ("calls", "decodes", "previews", "looks")}
    return engine.occupancy.mean, parts | {"all else": 1 - sum(parts.values())}


def stock_best_of_n(session: Session, prompt: str, count: int) -> int:
    """The place of the best of `count` images that the stock pipeline makes of seeds 0, 1, ..., and rewards judge."""
    from ttsnap.live.judging import judge

    sampler = session.sampler
    rewards = []
    for start in range(0, count, sampler.max_batch):
        images = stock_images(sampler, prompt, range(start, min(start + sampler.max_batch, count))).to(sampler.device)
        judged = [judge(name, reward, images, [prompt] * len(images), 0.0) for name, reward in session.judges.items()]
        rewards.append(np.stack(judged, axis=-1))
    found = np.concatenate(rewards)[None].astype(float)
    return int(np.argmax(session.combine(found, np.ones(found.shape[:2], dtype=bool))))


def stock_images(sampler: Sampler, prompt: str, seeds: Sequence[int]) -> Tensor:
    """Images [n, 3, h, w] of one stock call for all seeds; where the pipeline makes one a call, of a call for each."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    options = sampler.call_options() | {"output_type": "np"}
    if "num_images_per_prompt" in inspect.signature(sampler.pipe.__call__).parameters:
        options |= {"num_images_per_prompt": len(generators), "generator": generators}
        made = sampler.pipe(prompt, **options).images
    else:
        made = np.concatenate([sampler.pipe(prompt, generator=one, **options).images for one in generators])
    return torch.from_numpy(np.asarray(made)).movedim(-1, 1)


def in_turns(
    works: Mapping[str, Callable[[], Any]], device: Any, repeats: int, on_turn: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Seconds [repeats] of each of some works, by turns, and MiB that each takes beyond what was there, at most."""
    took: dict[str, list[float]] = {name: [] for name in works}
    peaks: dict[str, list[float | None]] = {name: [] for name in works}
    for number in range(repeats):
        names = list(works)
        for name in names if number % 2 else reversed(names):
            gc.collect()
            before = _reset_peak(device)
            start = now(device)
            works[name]()
            took[name].append(now(device) - start)
            after = _peak(device)
            peaks[name].append(None if before is None or after is None else (after - before) / 2**20)
        on_turn()
    most = {name: max((p for p in found if p is not None), default=None) for name, found in peaks.items()}
    return {name: np.array(found) for name, found in took.items()}, most


def now(device: Any) -> float:
    """Seconds; on a CPU those that this process computed, which other programs on the machine hardly change."""
    wait(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def _reset_peak(device: Any) -> int | None:
    """Bytes in use; the peak starts from now."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux
        return None
    return _resident("VmRSS")


def _peak(device: Any) -> int | None:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return _resident("VmHWM")


def _resident(field: str) -> int | None:
    """Bytes of this process in main memory: now (VmRSS) or at most (VmHWM)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def table(found: Sequence[Speed]) -> list[str]:
    """As lines of a table in Markdown."""
    shares = ("calls", "decodes", "previews", "looks", "all else")
    columns = [
        "",
        "candidates",
        "calls made",
        "s",
        "per call: of stock",
        "places used",
        "over bare calls",
        *shares,
        "peak MiB",
    ]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in found:
        low, high = one.per_call_range
        cells = [one.name, str(one.candidates), str(one.calls), f"{one.seconds:.3g}"]
        cells += ["1" if one.name == STOCK else f"{one.per_call:.3f} ({low:.3f} to {high:.3f})"]
        cells += ["" if one.occupancy is None else f"{one.occupancy:.0%}"]
        cells += ["" if one.overhead is None else f"x{one.overhead:.3f}"]
        cells += ["" if one.shares is None else f"{one.shares[name]:.1%}" for name in shares]
        cells += ["" if one.peak is None else f"{one.peak:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
