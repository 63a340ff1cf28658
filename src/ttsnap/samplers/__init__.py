"""One adapter per model family; each drives a stock diffusers pipeline through its public parts."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ttsnap.samplers.base import BaseSampler, Declined, PipelineSampler, Trajectories

SAMPLERS = {
    "FluxPipeline": ("ttsnap.samplers.flux", "FluxSampler"),
    "Flux2Pipeline": ("ttsnap.samplers.flux2", "Flux2Sampler"),
    "Flux2KleinPipeline": ("ttsnap.samplers.flux2", "Flux2Sampler"),
    "QwenImagePipeline": ("ttsnap.samplers.qwen_image", "QwenImageSampler"),
    "ZImagePipeline": ("ttsnap.samplers.z_image", "ZImageSampler"),
}

__all__ = ["SAMPLERS", "BaseSampler", "Declined", "PipelineSampler", "Trajectories", "for_pipeline"]


def for_pipeline(pipe: Any, **options: Any) -> PipelineSampler:
    """The sampler that drives a stock diffusers pipeline.

    Args:
        pipe: a loaded pipeline.
        **options: passed to the sampler, see its class; None means its default.

    Raises:
        ValueError: no sampler knows this pipeline; the message names those that are known.
    """
    name = type(pipe).__name__
    if name not in SAMPLERS:
        raise ValueError(f"no sampler for {name}; known pipelines are {', '.join(SAMPLERS)}")
    module, kind = SAMPLERS[name]
    sampler: PipelineSampler = getattr(import_module(module), kind)(
        pipe, **{key: value for key, value in options.items() if value is not None}
    )
    return sampler
