"""Pictures of x0 estimates that cost less than the full decoder: what early looks judge, or people see.

A preview serves looks before the last call; finished images always use the model's own decoder. Its cost is counted
like everything else, see `ttsnap.core.cost.LookCost`. Searches choose one by themselves, see `choose`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ttsnap.pipelines.models import MODELS, model_name
from ttsnap.pipelines.sampler import Preview, Sampler

KINDS = "auto, full, tiny[=DIR], small[=PIXELS] or linear"
SMALL = 256  # pixels of the longer side: about what image-text rewards read
LARGE = 512  # pixels from which a search saves full decodes: the averaged latents then have 32 cells a side
# Tiny decoders made for the latents of a family, by the channels and the scale of its VAE.
TINY = {
    (4, 0.18215): "madebyollin/taesd",
    (4, 0.13025): "madebyollin/taesdxl",
    (16, 1.5305): "madebyollin/taesd3",
    (16, 0.3611): "madebyollin/taef1",
}


class Tiny(Preview):
    """A distilled decoder of a few hundred thousand parameters (`AutoencoderTiny`).

    Latents go in as the denoiser sees them, moved by the tiny model's own scale and shift (1 and 0 for the TAESD
    family, which was trained on normalised latents).

    Args:
        vae: the `AutoencoderTiny`.
    """

    name = "tiny"

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def __call__(self, sampler: Sampler, latents: Tensor) -> Tensor:
        """Pictures as large as the finished image."""
        weight = next(self.vae.parameters())
        device, config = latents.device, self.vae.config
        latents = sampler.normalised(latents.float()).to(weight.device, weight.dtype)
        latents = latents / config.scaling_factor + config.shift_factor
        return _to_unit(self.vae.decode(latents, return_dict=False)[0]).to(device)


class Small(Preview):
    """The full decoder on latents averaged down to what the reward reads.

    Args:
        pixels: longer side of the pictures (default: 256, or half the image if that is less).
    """

    name = "small"

    def __init__(self, pixels: int | None = None) -> None:
        self.pixels = pixels

    def __call__(self, sampler: Sampler, latents: Tensor) -> Tensor:
        """Pictures with a longer side of about `pixels`."""
        image = max(sampler.height, sampler.width)
        share = min(1.0, (self.pixels or min(SMALL, image // 2)) / image)
        size = [max(1, round(side * share)) for side in latents.shape[-2:]]
        return sampler.decode_spatial(F.interpolate(latents, size, mode="area"))


class Linear(Preview):
    """Each latent pixel's colour as a linear map of its channels: for display, and almost free.

    Args:
        weight: map [3, channels + 1], the last column added.
    """

    name = "linear"

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, sampler: Sampler, latents: Tensor) -> Tensor:
        """Pictures of the latents' size."""
        latents, weight = latents.float(), self.weight.to(latents.device)
        rows = latents.movedim(1, -1) @ weight[:, :-1].T + weight[:, -1]
        return rows.movedim(-1, 1).clamp(0, 1)

    @classmethod
    @torch.no_grad()
    def fit(cls, sampler: Sampler, images: int = 8) -> Linear:
        """Least squares on pictures of random colours that the model's own encoder turns into latents.

        Raises:
            ValueError: the model's encoder does not do that.
        """
        pictures = _colours(images, sampler.height, sampler.width).to(sampler.device)
        latents = sampler.encode_spatial(pictures).float()
        colours = F.interpolate(pictures, latents.shape[-2:], mode="area")
        rows = latents.movedim(1, -1).flatten(0, 2).double().cpu()
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
        target = colours.movedim(1, -1).flatten(0, 2).double().cpu()
        return cls(torch.linalg.lstsq(rows, target, driver="gelsd").solution.T.float().contiguous())


def _colours(count: int, height: int, width: int) -> Tensor:
    """Pictures [count, 3, height, width] in 0..1 of random colours, in soft and in hard-edged patches of many sizes."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        patches = 2 + number // 2
        colours = torch.rand(1, 3, patches, patches, generator=generator)
        made.append(F.interpolate(colours, (height, width), mode="bilinear" if number % 2 else "nearest"))
    return torch.cat(made)


def _to_unit(images: Tensor) -> Tensor:
    """Images in -1..1 as fp32 in 0..1."""
    return (images.float() / 2 + 0.5).clamp(0, 1)


def parse(text: str | None) -> tuple[str, str | None]:
    """Kind and value of `auto`, `full`, `tiny`, `tiny=DIR`, `small`, `small=PIXELS` or `linear`.

    Raises:
        ValueError: something else.
    """
    kind, equals, value = (text or "full").partition("=")
    alone = ("auto", "full", "linear")
    if kind not in (*alone, "tiny", "small") or (equals and (not value or kind in alone)):
        raise ValueError(f"a preview is {KINDS}, got {text!r}")
    if kind == "small" and value and not (value.isdigit() and int(value) > 0):
        raise ValueError(f"preview small takes pixels, such as small=224, got {text!r}")
    return kind, value or None


def attach(sampler: Sampler, preview: str | Preview | None) -> None:
    """Let a sampler's early looks use a preview, given as text (see `parse`) or made already.

    Raises:
        ValueError: unknown, no tiny decoder is known for the model, or it does not fit the model's latents.
    """
    if isinstance(preview, Preview):
        sampler.preview = preview
        return
    kind, value = parse(preview)
    if kind == "tiny":
        sampler.preview = Tiny(_load_tiny(sampler, value))
    elif kind == "small":
        sampler.preview = Small(int(value) if value else None)
    elif kind == "linear":
        sampler.preview = Linear.fit(sampler)
    elif kind == "auto":
        sampler.preview = choose(sampler)
    else:
        sampler.preview = None


def choose(sampler: Sampler) -> Preview | None:
    """The cheap pictures that a search uses unless told otherwise; None: the full decoder.

    Of large images a decode costs much of a call: 10.5 TFLOP at 1024 px, where a call of SDXL takes 13.5. Then the tiny
    decoder of the model's latents serves, if it is at hand (beside the model's directory, or from the hub), else the
    full decoder on averaged latents.
    """
    if max(sampler.height, sampler.width) < LARGE or not sampler.draws_pictures:
        return None
    model = Path(model_name(sampler.pipe))
    source = _known_tiny(sampler)
    places = [str(model.parent / source.rpartition("/")[2]), source] if source and model.exists() else [source]
    for place in filter(None, places):
        if place == source or Path(place).is_dir():
            with contextlib.suppress(ValueError):
                return Tiny(_load_tiny(sampler, place, here=model.exists()))
    return Small()


def _known_tiny(sampler: Sampler) -> str:
    """The tiny decoder made for the model's latents; empty if none is known."""
    own = MODELS.get(model_name(sampler.pipe))
    if own is not None and own.preview is not None:
        return str(own.preview)
    vae = getattr(sampler.pipe, "vae", None)
    config = getattr(vae, "config", None) if type(vae).__name__ == "AutoencoderKL" else None
    channels, scale = getattr(config, "latent_channels", None), getattr(config, "scaling_factor", None)
    return next((name for (c, s), name in TINY.items() if c == channels and scale and abs(scale - s) < 1e-4), "")


def _load_tiny(sampler: Sampler, source: str | None, *, here: bool = False) -> Any:
    """The tiny decoder in a directory or on the hub, on the sampler's device; a model may have its own.

    `here`: without the network.
    """
    from diffusers import AutoencoderTiny

    name = type(sampler.pipe).__name__
    source = source or _known_tiny(sampler)
    if not source:
        raise ValueError(f"no tiny decoder is known for {name}; give one of its own as tiny=DIR, or use small")
    if Path(source).exists() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} is not the directory of a tiny decoder: it has no config.json")
    try:
        vae = AutoencoderTiny.from_pretrained(source, torch_dtype=sampler.pipe.vae.dtype, local_files_only=here)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load tiny decoder {source!r}: {str(error).strip().splitlines()[0]}") from error
    has, needs = vae.config.latent_channels, getattr(sampler.pipe.vae.config, "latent_channels", None)
    if needs is not None and has != needs:
        raise ValueError(f"tiny decoder {source!r} reads {has} latent channels, {name} has {needs}")
    return vae.eval().requires_grad_(False).to(sampler.device)
