"""What it costs a noise-aware reward to change the noise level: seconds of a switch over those of a look.

python benchmarks/switching.py RUN
"""

from __future__ import annotations

import argparse
import time

import torch

from ttsnap.rewards.noise_aware import load_noise_aware


def seconds(work, times: int) -> float:
    """Best of five, per item."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for number in range(times):
            work(number)
        best = min(best, (time.perf_counter() - start) / times)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a noise-aware reward")
    run = parser.parse_args().run
    reward = load_noise_aware(run)
    images = torch.rand(1, 3, 64, 64)
    sigmas = [*reward.sigmas, 0.0]
    look = seconds(lambda _: reward(images, ["a red circle"], sigma=0.0), 50)
    switch = seconds(lambda number: reward._switch(reward.level(sigmas[number % len(sigmas)])), 1000)
    print(f"a look {look * 1e6:.0f} us, a switch {switch * 1e6:.1f} us: {100 * switch / look:.2f} % of a look")


if __name__ == "__main__":
    main()
