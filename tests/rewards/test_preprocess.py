"""Preprocessing on tensors against PIL and against transformers' own processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ttsnap.rewards import preprocess
from ttsnap.rewards.clip import transformers_crop

SIZES = [(64, 64), (512, 512), (512, 768), (300, 200), (225, 224), (224, 227), (37, 91)]


def picture(height, width, smooth=False):
    if not smooth:
        return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    y, x = (axis[..., None] for axis in np.mgrid[0:height, 0:width])
    return ((np.sin(y / 7) * (1, 0.5, 0.2) + np.cos(x / 11)) * 60 + 128).clip(0, 255).astype(np.uint8)


def tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_resizing_stays_within_two_levels_of_pil(height, width, smooth):
    array = picture(height, width, smooth)
    new = (int(224 * height / min(height, width)), int(224 * width / min(height, width)))
    expected = np.asarray(Image.fromarray(array).resize(new[::-1], Image.Resampling.BICUBIC), dtype=float)
    ours = preprocess.resize(tensor(array), *new)[0].permute(1, 2, 0).numpy() * 255
    difference = np.abs(ours - expected)
    assert difference.max() <= 2.001
    assert difference.mean() < 0.03
    plain = F.interpolate(tensor(array), new, mode="bicubic")[0].permute(1, 2, 0).numpy() * 255
    if not smooth and height > 448:  # without antialiasing it would be far off
        assert np.abs(plain - expected).mean() > 10


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_crop_of_transformers(height, width):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    array = picture(height, width, smooth=True)
    expected = CLIPImageProcessorPil()(images=[Image.fromarray(array)], return_tensors="pt").pixel_values
    ours = transformers_crop(tensor(array), 224)
    assert ours.shape == expected.shape == (1, 3, 224, 224)
    levels = (ours - expected).abs() * torch.tensor(preprocess.STD)[:, None, None] * 255
    assert levels.max() < 2.01
    assert levels.mean() < 0.03


def test_half_a_pixel_is_cut_as_each_library_does():
    ramp = torch.arange(227).float().expand(1, 3, 224, 227) / 255  # 3 too many: 1.5 on each side
    first = {}
    for halves_up in (True, False):
        cut = preprocess.shortest_crop(ramp, 224, halves_up=halves_up)
        first[halves_up] = (cut * torch.tensor(preprocess.STD)[:, None, None])[0, 0, 0, 0] + preprocess.MEAN[0]
    assert {key: round(float(value) * 255) for key, value in first.items()} == {True: 2, False: 1}


@pytest.mark.parametrize(("height", "width"), [(512, 512), (300, 200), (112, 224), (64, 64), (1, 500)])
def test_hps_pads_the_shorter_side_with_black(height, width):
    array = picture(height, width)
    image = tensor(array)
    scale = 224 / max(height, width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    resized = F.interpolate(image, (h, w), mode="bicubic", antialias=True) if (h, w) != (height, width) else image
    expected = torch.zeros(1, 3, 224, 224)
    top, left = (224 - h) // 2, (224 - w) // 2
    expected[..., top : top + h, left : left + w] = resized
    ours = preprocess.longest_pad(image, 224)
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.MEAN, preprocess.STD))
    torch.testing.assert_close(ours * std + mean, expected, atol=2e-6, rtol=0)
    if height == width == 64:
        assert expected.min() < 0 or expected.max() > 1  # overshoot is not cut


def test_a_tensor_is_judged_as_its_file_would_be():
    image = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    stored = (image * 255).round().byte().float() / 255
    for prepare in (preprocess.longest_pad, preprocess.shortest_crop):
        torch.testing.assert_close(prepare(image, 32), prepare(stored, 32), atol=1e-6, rtol=0)


def test_gradients_and_low_precision():
    image = torch.rand(1, 3, 40, 60, requires_grad=True)
    for prepare in (preprocess.longest_pad, preprocess.shortest_crop):
        (gradient,) = torch.autograd.grad(prepare(image, 32).square().sum(), image)
        assert gradient.abs().sum() > 0
        assert prepare(image.detach().bfloat16(), 32).dtype == torch.float32
