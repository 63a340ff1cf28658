"""A reward of one's own: whatever pictures it takes, whatever it returns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ttsnap import rewards
from ttsnap.live.judging import judge, try_own

IMAGES = torch.rand(3, 3, 8, 6, generator=torch.Generator().manual_seed(0))
MEANS = ((IMAGES * 255).round() / 255).mean((1, 2, 3)).tolist()


def tensors(images, prompts):
    return images.mean((1, 2, 3))


def pil(images, prompts):
    return [np.asarray(image.convert("RGB")).mean() / 255 for image in images]


def said_pil(images: list[Image.Image], prompts, *, sigma):
    assert all(isinstance(image, Image.Image) for image in images)
    return torch.tensor(pil(images, prompts))


def said_arrays(images: np.ndarray, prompts, sigma):
    assert (images.dtype, images.shape[-1]) == (np.uint8, 3)
    return images.mean(axis=(1, 2, 3)) / 255


def arrays(images, prompts):
    return images.astype(float).mean((1, 2, 3)) / 255  # a tensor has no astype, a list neither


class Scorer:
    """As people wrap a model: on a device, called with pictures."""

    device = "cpu"
    tflop = 0.25

    def __call__(self, images, prompts):
        return np.array([[image.getpixel((0, 0))[0]] for image in images])


@pytest.mark.parametrize("own", [tensors, pil, said_pil, said_arrays, arrays])
def test_it_is_given_what_it_takes(own):
    try_own(own, "a", None)
    (reward,) = rewards.load(own).values()
    for _ in range(2):  # what it takes is known the second time
        np.testing.assert_allclose(judge("mine", reward, IMAGES, ["a"] * 3, 0.5), MEANS, atol=2.5e-3)


def test_an_object_keeps_what_it_says_of_itself():
    (reward,) = rewards.load({"mine": Scorer()}).values()
    assert reward.tflop == 0.25
    assert judge("mine", reward, IMAGES, ["a"] * 3, 0.0).tolist() == (IMAGES[:, 0, 0, 0] * 255).round().tolist()


@pytest.mark.parametrize("answer", [3.0, [3], np.float64(3), np.array(3), torch.tensor(3), torch.tensor([[3.0]])])
def test_one_number_for_one_image_may_be_written_in_any_way(answer):
    assert judge("mine", lambda images, prompts, *, sigma: answer, IMAGES[:1], ["a"], 0.0).tolist() == [3]


def test_one_that_takes_nothing_says_why_for_each_kind():
    def broken(images, prompts):
        return [image.convert("RGB").missing for image in images]

    with pytest.raises(
        ValueError,
        match=r"reward 'broken' fails on two pictures .*given a tensor, AttributeError: .*"
        r"given PIL pictures, AttributeError: .*missing.*given an array, .*returns n",
    ):
        try_own(broken, "a", None)


def test_memory_that_runs_out_is_not_taken_for_the_wrong_kind():
    asked = []

    def big(images, prompts):
        asked.append(type(images))
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        rewards.load(big)["big"](IMAGES, ["a"] * 3, sigma=0.0)
    assert asked == [torch.Tensor]
