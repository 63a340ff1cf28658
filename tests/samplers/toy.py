"""A model family of one line: the smallest sampler there can be, whose work takes the time it is told to."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from ttsnap.samplers import BaseSampler


class Time:
    """A clock that only moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, fixed, each, count):
        self.now += fixed + each * count


class ToySampler(BaseSampler):
    """Latents [n, 3, 4, 4] that shrink towards their mean; an image is its latent."""

    def __init__(self, num_steps=4, max_batch=8, clock=None, call=(0.5, 0.25), decode=(0.25, 0.125), fits=1000):
        pipe = SimpleNamespace(_execution_device=torch.device("cpu"), components={})
        super().__init__(pipe, num_steps=num_steps, height=4, width=4, max_batch=max_batch)
        self.clock, self.times, self.fits = clock or Time(), {"call": call, "decode": decode}, fits
        self.decoded = []

    @property
    def sigmas(self):
        return [1 - step / self.num_steps for step in range(self.num_steps)]

    def noise(self, seed):
        return torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))

    def encode(self, prompt):
        return len(prompt)

    def call(self, latents, encoded, index):
        self.clock.takes(*self.times["call"], len(encoded))
        return 0.5 * (latents + latents.mean((2, 3), keepdim=True)), latents

    def decode_batch(self, x0):
        if len(x0) > self.fits:
            raise torch.OutOfMemoryError("full")
        self.clock.takes(*self.times["decode"], len(x0))
        self.decoded.append(len(x0))
        return x0


class ToyReward:
    """How bright an image is; takes its time."""

    def __init__(self, clock=None, seconds=(0.0625, 0.03125)):
        self.clock, self.seconds, self.asked = clock or Time(), seconds, []

    def __call__(self, images, prompts, *, sigma):
        self.clock.takes(*self.seconds, len(images))
        self.asked.append((len(images), sigma))
        return images.mean((1, 2, 3))
