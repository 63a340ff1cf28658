"""Recordings made up in the test: looks that say more with every step."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ttsnap.recordings import Recording


def rewards(prompts=12, candidates=40, steps=8, kinds=1, noise=1.0, seed=0):
    """Final rewards plus noise that fades with the steps: [prompts, candidates, steps, kinds]."""
    rng = np.random.default_rng(seed)
    final = rng.normal(size=(prompts, candidates, 1, kinds)) + rng.normal(size=(prompts, 1, 1, kinds))
    fading = noise * (steps / np.arange(1, steps + 1) - 1)[None, None, :, None]
    return (final + fading * rng.normal(size=(prompts, candidates, steps, kinds))).astype(np.float32)


def recording(path: Path, clean=None, aware=None, **options) -> Recording:
    """A recording of made-up rewards."""
    clean = rewards(**options) if clean is None else clean
    prompts, candidates, steps, kinds = clean.shape
    made = Recording.create(
        path,
        prompts=[f"prompt {p}" for p in range(prompts)],
        num_candidates=candidates,
        num_steps=steps,
        rewards=[f"reward{k}" for k in range(kinds)],
        provenance={
            "cost_model": {
                "name": "made up",
                "call_tflop": 1.0,
                "decode_tflop": 0.2,
                "look_tflop": 0.3,
                "prompt_tflop": 0.5,
            }
        },
    )
    made.write(slice(None), clean, aware)
    return made
