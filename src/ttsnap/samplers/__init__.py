"""One adapter per model family, which drives a stock diffusers pipeline through its public parts; one for the rest.

What has no adapter, or is declined by it, runs with its own call (`ttsnap.samplers.any_pipeline`).
"""

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
    "SanaPipeline": ("ttsnap.samplers.sana", "SanaSampler"),
    "PixArtSigmaPipeline": ("ttsnap.samplers.pixart", "PixArtSampler"),
}

KINDS = ("auto", "adapter", "fallback")

__all__ = [
    "KINDS",
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
        **options: passed to the sampler, see its class; None means its default. `arguments` (more arguments of the
            pipeline's call) and `look_frames` are the fallback's. `sampler` picks: `adapter`, `fallback` (the
            pipeline's own call, one candidate at a time), or `auto` (default): the adapter where there is one that
            takes this pipeline, its scheduler and these arguments, else the fallback, which says so in its `notes`.

    Raises:
        ValueError: no adapter knows this pipeline and one is asked for, or the sampler does not know an option; the
            message names those that are known.
    """
    given = {key: value for key, value in options.items() if value is not None}
    kind = given.pop("sampler", "auto")
    if kind not in KINDS:
        raise ValueError(f"a sampler is one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "fallback":
        return _fallback(pipe, given)
    try:
        return _adapter(pipe, given)
    except Declined as error:
        if kind == "adapter":
            raise
        sampler = _fallback(pipe, given)
        sampler.notes.insert(0, f"{error}; so the pipeline runs with its own call, one candidate at a time")
        return sampler


def _adapter(pipe: Any, options: dict[str, Any]) -> PipelineSampler:
    """The adapter of a pipeline's family; Declined where there is none, or where it cannot do what is asked."""
    name = type(pipe).__name__
    if name not in SAMPLERS:
        raise Declined(f"there is no adapter for {name}")
    module, kind = SAMPLERS[name]
    cls: type[PipelineSampler] = getattr(import_module(module), kind)
    known = options_of(cls)
    for key in options:
        if key in ("arguments", "look_frames") and options[key]:
            raise Declined(f"the adapter of {name} takes no {key.replace('_', ' ')} of the pipeline's call")
        if key not in known and key not in ("arguments", "look_frames"):
            raise ValueError(f"the sampler of {name} has no option {key!r}; it has {', '.join(known)}")
    return cls(pipe, **{key: value for key, value in options.items() if key in known})


def _fallback(pipe: Any, options: dict[str, Any]) -> PipelineSampler:
    """The pipeline's own call; options that it does not know are arguments of that call."""
    from ttsnap.samplers.any_pipeline import AnyPipelineSampler

    known = options_of(AnyPipelineSampler)
    more = {key: value for key, value in options.items() if key not in known} | dict(options.get("arguments", {}))
    own = {key: value for key, value in options.items() if key in known}
    return AnyPipelineSampler(pipe, **own | {"arguments": more})


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
