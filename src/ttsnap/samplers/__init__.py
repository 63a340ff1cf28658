"""One adapter per model family; each drives a stock diffusers pipeline through its public parts."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from ttsnap.samplers.base import BaseSampler, Declined, PipelineSampler, Trajectories

SAMPLERS = {
    "FluxPipeline": ("ttsnap.samplers.flux", "FluxSampler"),
    "Flux2Pipeline": ("ttsnap.samplers.flux2", "Flux2Sampler"),
    "Flux2KleinPipeline": ("ttsnap.samplers.flux2", "Flux2Sampler"),
    "QwenImagePipeline": ("ttsnap.samplers.qwen_image", "QwenImageSampler"),
    "ZImagePipeline": ("ttsnap.samplers.z_image", "ZImageSampler"),
    "StableDiffusionPipeline": ("ttsnap.samplers.stable_diffusion", "StableDiffusionSampler"),
    "StableDiffusionXLPipeline": ("ttsnap.samplers.sdxl", "SDXLSampler"),
    "StableDiffusion3Pipeline": ("ttsnap.samplers.stable_diffusion_3", "StableDiffusion3Sampler"),
}

__all__ = [
    "SAMPLERS",
    "BaseSampler",
    "Declined",
    "PipelineSampler",
    "Trajectories",
    "for_pipeline",
    "options_of",
]


def for_pipeline(pipe: Any, **options: Any) -> PipelineSampler:
    """The sampler that drives a stock diffusers pipeline.

    Args:
        pipe: a loaded pipeline.
        **options: passed to the sampler, see its class; None means its default.

    Raises:
        ValueError: no sampler knows this pipeline, or the sampler does not know an option; the message names those
            that are known.
    """
    name = type(pipe).__name__
    if name not in SAMPLERS:
        raise ValueError(f"no sampler for {name}; known pipelines are {', '.join(SAMPLERS)}")
    module, kind = SAMPLERS[name]
    cls: type[PipelineSampler] = getattr(import_module(module), kind)
    given = {key: value for key, value in options.items() if value is not None}
    known = options_of(cls)
    for key in given:
        if key not in known:
            raise ValueError(f"the sampler of {name} has no option {key!r}; it has {', '.join(known)}")
    return cls(pipe, **given)


def options_of(cls: type) -> list[str]:
    """Names of the options of a sampler class, with those that it passes on to its base class."""
    names: dict[str, None] = {}
    for part in cls.__mro__:
        if "__init__" in vars(part):
            parameters = inspect.signature(part.__init__).parameters.values()  # type: ignore[misc]
            names |= dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return list(names)
