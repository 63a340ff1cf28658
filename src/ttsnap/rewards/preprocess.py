"""From images in 0..1 to what each reward model was trained to see, on tensors and on the images' own device.

The published rewards were trained and are scored on 8-bit images that PIL resized. `resize` repeats that on tensors:
one antialiased bicubic pass for the width and one for the height, each rounded to 8 bits as PIL does. It stays within 2
of 255 levels of PIL, and gradients pass through the rounding as if it were not there. Without antialiasing the
difference is 15 to 21 levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images; BLIP and ImageReward use the same
STD = (0.26862954, 0.26130258, 0.27577711)


def shortest_crop(images: Tensor, side: int, *, halves_up: bool = True) -> Tensor:
    """Shortest side to `side`, then the square in the middle: ImageReward, PickScore, CLIPScore, aesthetic.

    Args:
        images: [n, 3, h, w] in 0..1.
        side: of the square, in pixels.
        halves_up: where an odd number of pixels is cut, how to halve it: rounded as torchvision does (ImageReward,
            aesthetic), or down as transformers does (PickScore, CLIPScore).

    Returns:
        [n, 3, side, side], normalised.
    """
    height, width = images.shape[-2:]
    shortest = min(height, width)
    images = resize(images, int(side * height / shortest), int(side * width / shortest))
    spare = [(length - side) / 2 for length in images.shape[-2:]]
    top, left = (round(half) if halves_up else int(half) for half in spare)
    return normalise(images[..., top : top + side, left : left + side])


def longest_pad(images: Tensor, side: int) -> Tensor:
    """Longest side to `side`, black around it: HPSv2, which resizes tensors and never rounds or clamps.

    Args:
        images: [n, 3, h, w] in 0..1.
        side: of the square, in pixels.

    Returns:
        [n, 3, side, side], normalised.
    """
    images = eight_bits(images)
    scale = side / max(images.shape[-2:])
    height, width = (max(1, round(length * scale)) for length in images.shape[-2:])
    if (height, width) != images.shape[-2:]:
        images = _bicubic(images, height, width)
    above, before = (side - height) // 2, (side - width) // 2
    return normalise(F.pad(images, (before, side - width - before, above, side - height - above)))


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Images [n, 3, h, w] in 0..1 at another size [n, 3, height, width], as PIL's bicubic filter makes them."""
    images = eight_bits(images)
    if width != images.shape[-1]:
        images = eight_bits(_bicubic(images, images.shape[-2], width))
    if height != images.shape[-2]:
        images = eight_bits(_bicubic(images, height, width))
    return images


def eight_bits(images: Tensor) -> Tensor:
    """Images in 0..1 rounded to 255 levels, so that a reward of a tensor is the reward of its file."""
    images = images.float().clamp(0, 1)
    return images + ((images * 255).round() / 255 - images).detach()


def _bicubic(images: Tensor, height: int, width: int) -> Tensor:
    # In full precision: the antialiased filter knows no bfloat16 on CPU.
    with torch.autocast(images.device.type, enabled=False):
        return F.interpolate(images.float(), (height, width), mode="bicubic", antialias=True, align_corners=False)


def square(images: Tensor) -> Tensor:
    """Images [n, 3, h, w] in 0..1 in the middle of a square of CLIP's mean colour, which CLIP-FlanT5 is shown."""
    images = eight_bits(images)
    height, width = images.shape[-2:]
    side = max(height, width)
    above, before = (side - height) // 2, (side - width) // 2
    colour = torch.tensor([int(mean * 255) / 255 for mean in MEAN], device=images.device)[:, None, None]
    padded = colour.expand(3, side, side).repeat(len(images), 1, 1, 1)
    padded[..., above : above + height, before : before + width] = images
    return padded


def whole_patches(height: int, width: int, unit: int, least: int, most: int) -> tuple[int, int]:
    """The size at which Qwen's vision-language models see an image: whole units, the aspect kept as well as it goes.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        unit: sides become multiples of this.
        least: pixels of the whole that it has at least.
        most: pixels of the whole that it has at most.
    """
    new = [max(unit, round(side / unit) * unit) for side in (height, width)]
    if new[0] * new[1] > most:
        factor = math.sqrt(height * width / most)
        new = [max(unit, math.floor(side / factor / unit) * unit) for side in (height, width)]
    elif new[0] * new[1] < least:
        factor = math.sqrt(least / (height * width))
        new = [math.ceil(side * factor / unit) * unit for side in (height, width)]
    return new[0], new[1]


def patches(images: Tensor, size: int, merge: int, frames: int) -> Tensor:
    """Images [n, 3, h, w] cut into patches [n x patches, 3 x frames x size x size], as Qwen's image towers take them.

    Args:
        images: normalised; their sides are multiples of size x merge.
        size: of a patch, in pixels.
        merge: patches that become one token lie side by side, merge x merge of them.
        frames: how often each patch is repeated: a picture is a video that stands still.
    """
    count, channels, height, width = images.shape
    cut = images.reshape(count, channels, height // size // merge, merge, size, width // size // merge, merge, size)
    cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]
    return cut.expand(*cut.shape[:6], frames, size, size).reshape(-1, channels * frames * size * size)


def normalise(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Images in 0..1 with a mean and standard deviation (CLIP's) taken out of each channel."""
    offset, scale = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return (images - offset) / scale
