"""Where tokens are pushed: after which attentions of a pipeline, as the authors' code has it for each family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

ALPHAS = {"FluxPipeline": 0.9, "StableDiffusionXLPipeline": 1.9, "StableDiffusionPipeline": 1.9}


class Site(NamedTuple):
    """An attention of the denoiser.

    Attributes:
        module: the attention, or its output projection.
        before: the image tokens are what the module takes, else what it gives.
        tokens: image tokens; text tokens come before them.
    """

    module: nn.Module
    before: bool
    tokens: int


def sites_of(sampler: Any, parameters: Any) -> list[Site]:
    """The attentions that take part, in the order in which they run.

    Args:
        sampler: of one of the families in ALPHAS.
        parameters: a `ttsnap.pipelines.negtome.Negtome`: which blocks.
    """
    return _unet(sampler, parameters) if hasattr(sampler.pipe, "unet") else _flux(sampler, parameters)


def _flux(sampler: Any, parameters: Any) -> list[Site]:
    """The joint blocks, before the output projection of their attention, then the single blocks."""
    unit, transformer = 2 * sampler.pipe.vae_scale_factor, sampler.pipe.transformer
    tokens = (sampler.height // unit) * (sampler.width // unit)
    joint = _first(transformer.transformer_blocks, parameters.num_joint_blocks)
    single = _first(transformer.single_transformer_blocks, parameters.num_single_blocks)
    return [Site(block.attn.to_out[0], True, tokens) for block in joint] + [
        Site(block.attn, False, tokens) for block in single
    ]


def _unet(sampler: Any, parameters: Any) -> list[Site]:
    """Self- and cross-attentions in the chosen parts of a UNet, where the picture is at least `min_attn_dim` wide."""
    unet, side = sampler.pipe.unet, sampler.pipe.vae_scale_factor
    sizes = [(sampler.height // side, sampler.width // side)]
    for _ in unet.down_blocks[1:]:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    sites = []
    for name in unet.attn_processors:
        part, number = name.split(".")[:2]
        level = int(number) if part == "down_blocks" else -1 - int(number) if part == "up_blocks" else -1
        height, width = sizes[level]
        if part in parameters.blocks.split("+") and min(height, width) >= parameters.min_attn_dim:
            sites.append(Site(unet.get_submodule(name.removesuffix(".processor")), False, height * width))
    return sites


def _first(blocks: Any, count: int) -> list[Any]:
    return list(blocks if count < 0 else blocks[:count])
