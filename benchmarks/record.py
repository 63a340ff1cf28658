"""What recording adds to sampling and decoding: both do the same batches in turns, and the sums of their times compare.

python benchmarks/record.py [--batches 6] [--calls 1,5,20]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from ttsnap.live.session import load_sampler
from ttsnap.pipelines.outputs import to_uint8
from ttsnap.recordings.recorder import plan_tree, record_images, seeds_of, walk
from ttsnap.shapes.scenes import train_prompts

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--calls", help="such as 1,5,20 (default: all)")
    parser.add_argument("--format", default="png")
    options = parser.parse_args()
    calls = [int(call) for call in options.calls.split(",")] if options.calls else None
    sampler = load_sampler("shapes", max_batch=BATCH)
    alone = recorded = 0.0
    images = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.batches + 1):
            prompts = train_prompts()[number * 4 : number * 4 + 4]
            seeds = seeds_of(range(number * 4, number * 4 + 4), BATCH // 4)
            tree = plan_tree(
                sampler, Path(folder, str(number)), prompts, seeds, calls=calls, image_format=options.format
            )
            texts = [prompt for prompt in prompts for _ in range(BATCH // 4)]
            start = time.perf_counter()
            for view in walk(sampler, texts, seeds.ravel().tolist(), tree.calls):
                to_uint8(view.images)  # a view decodes when it is asked
            sampler.forget_prompts()
            middle = time.perf_counter()
            made = record_images(sampler, tree)
            end = time.perf_counter()
            if number:  # the first warms up
                alone, recorded, images = alone + middle - start, recorded + end - middle, images + made
    print(f"{images} images of 64 x 64, {torch.get_num_threads()} threads")
    print(f"sampling and decoding alone: {images / alone:.0f} images/s")
    print(f"recording: {images / recorded:.0f} images/s")
    print(f"ratio of the times: {recorded / alone:.3f}")


if __name__ == "__main__":
    main()
