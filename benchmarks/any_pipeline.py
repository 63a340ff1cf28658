"""What a candidate costs by the fallback, by an adapter and in the stock pipeline's own loop: seconds and memory.

    OMP_NUM_THREADS=1 python benchmarks/any_pipeline.py                       # the embedded model, a tiny FLUX
    OMP_NUM_THREADS=1 python benchmarks/any_pipeline.py --model sdxl-tiny --size 64

One run prints the table of docs/any-pipeline.md. Seconds per call are differences of runs with many and with few steps,
in turns, divided by the candidates, so that prompts, noise and decoding cancel out; on a CPU they are seconds of
computing. Memory is what waiting candidates hold beyond the model: the tensors that are alive when all of them wait
half-way, less those before. The stock pipeline cannot wait.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import warnings

import numpy as np
import torch

from live import PROMPT, seconds
from random_models import MODELS
from ttsnap import samplers


def bytes_alive() -> int:
    """Bytes of all tensors, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects complain when they are looked at
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and not one.is_meta]
    storages = {storage.data_ptr(): storage.nbytes() for storage in (one.untyped_storage() for one in tensors)}
    return sum(storages.values())


def held(sampler, candidates) -> float:
    """KiB that each of so many candidates holds while it waits half-way."""
    sampler.forget_prompts()
    sampler.text(PROMPT)
    sampler.advance(sampler.start([PROMPT], [0]), 1)  # what is kept of the prompt belongs to no candidate
    before = bytes_alive()
    state = sampler.advance(sampler.start([PROMPT] * candidates, list(range(candidates))), sampler.num_steps // 2)
    taken = bytes_alive() - before
    assert len(state) == candidates
    return taken / candidates / 1024


def measure(make, pipe, candidates, few, many, repeats):
    """Seconds of one call of one candidate by each way, the least of runs in turns."""
    both = itertools.product(("adapter", "fallback"), (few, many))
    ways = {(kind, steps): make(sampler=kind, num_steps=steps) for kind, steps in both}
    device = ways["adapter", few].device

    def run(kind, steps):
        if kind.startswith("stock"):
            sampler = ways["adapter", steps]
            sizes = [candidates] if kind == "stock" else [1] * candidates
            for first in range(len(sizes)):
                generators = [torch.Generator("cpu").manual_seed(first + seed) for seed in range(sizes[first])]
                pipe([PROMPT] * sizes[first], generator=generators, output_type="latent", **sampler.call_options())
            return
        sampler = ways[kind.removesuffix(" alone"), steps]
        sampler.forget_prompts()
        batch = sampler.max_batch
        sampler.max_batch = 1 if kind.endswith("alone") else candidates
        sampler.advance(sampler.start([PROMPT] * candidates, list(range(candidates))), sampler.num_steps)
        sampler.max_batch = batch

    kinds, best = ("stock", "stock alone", "adapter", "adapter alone", "fallback"), {}
    for kind in kinds:
        run(kind, few)  # warm up
    for _ in range(repeats):
        for kind, steps in itertools.product(kinds, (few, many)):
            took = seconds(lambda k=kind, s=steps: run(k, s), device)
            best[kind, steps] = min(took, best.get((kind, steps), np.inf))
    each = {kind: (best[kind, many] - best[kind, few]) / (many - few) / candidates for kind in kinds}
    memory = {kind: held(ways[kind, many], candidates) for kind in ("adapter", "fallback")}
    return each, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", choices=["shapes", *MODELS])
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--few", type=int, default=4, help="steps of the shorter run")
    parser.add_argument("--many", type=int, default=20, help="steps of the longer run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.model == "shapes":
        from ttsnap.shapes.pipeline import load_pipeline

        pipe = load_pipeline()
    else:
        build, full = MODELS[arguments.model]
        pipe = build(torch.device(arguments.device), torch.bfloat16 if full else torch.float32, full)
    pipe.to(arguments.device).set_progress_bar_config(disable=True)
    more = {"max_sequence_length": 12} if type(pipe).__name__ == "FluxPipeline" else {}

    def make(**options):
        return samplers.for_pipeline(pipe, height=arguments.size, width=arguments.size, **more, **options)

    each, memory = measure(make, pipe, arguments.candidates, arguments.few, arguments.many, max(1, arguments.repeats))
    n = arguments.candidates
    rows = (
        ("stock pipeline", "stock", f"one batch of {n}", "-"),
        ("adapter", "adapter", f"one batch of {n}", f"{memory['adapter']:.1f}"),
        ("stock pipeline", "stock alone", "one by one", "-"),
        ("adapter", "adapter alone", "one by one", "-"),
        ("fallback", "fallback", "one by one", f"{memory['fallback']:.1f}"),
    )
    print(f"{arguments.model}, {arguments.size} px, {arguments.device}, {torch.get_num_threads()} thread(s)\n")
    print(
        "| runs by | candidates | ms per call and candidate | ratio to the stock pipeline alone | KiB per candidate |"
    )
    print("|---|---|---|---|---|")
    for name, kind, how, kib in rows:
        print(f"| {name} | {how} | {each[kind] * 1e3:.2f} | {each[kind] / each['stock alone']:.2f} | {kib} |")


if __name__ == "__main__":
    main()
