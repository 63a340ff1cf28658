"""The smallest pipeline there can be: real enough to be sampled, and its work takes the time it is told to."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from torch import nn

from ttsnap.pipelines.sampler import Sampler


class Time:
    """A clock that only moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, fixed, each, count):
        self.now += fixed + each * count


class Denoiser(ModelMixin):
    """Leads latents [n, 3, 4, 4] to themselves, blurred by half."""

    def __init__(self, clock, times):
        super().__init__()
        self.clock, self.times, self.batches = clock, times, []
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, latents, timestep, words):
        self.clock.takes(*self.times, len(latents))
        self.batches.append(len(latents))
        return self.weight * (latents - latents.mean((2, 3), keepdim=True)) * 0.5


class Decoder(ModelMixin):
    """An image is its latent."""

    def __init__(self, clock, times, fits):
        super().__init__()
        self.clock, self.times, self.fits, self.decoded = clock, times, fits, []
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def decode(self, latents):
        if len(latents) > self.fits:
            raise torch.OutOfMemoryError("full")
        self.clock.takes(*self.times, len(latents))
        self.decoded.append(len(latents))
        return self.weight * latents


class ToyPipeline(DiffusionPipeline):
    def __init__(self, transformer, vae, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.encoded = []

    def encode_prompt(self, prompt):
        self.encoded.append(prompt)
        return torch.tensor([[float(len(prompt))]])

    def __call__(self, prompt, num_inference_steps=4, generator=None, num_images_per_prompt=1, output_type="np"):
        generators = generator if isinstance(generator, list) else [generator]
        words = self.encode_prompt(prompt).repeat(num_images_per_prompt, 1)
        latents = torch.cat([torch.rand(1, 3, 4, 4, generator=one) for one in generators])
        self.scheduler.set_timesteps(sigmas=[1 - step / num_inference_steps for step in range(num_inference_steps)])
        for t in self.scheduler.timesteps:
            velocity = self.transformer(latents, t.expand(len(latents)), words)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        images = self.vae.decode(latents).clamp(0, 1)
        return (images.permute(0, 2, 3, 1).numpy(),)


def toy_pipeline(clock=None, call=(0.5, 0.25), decode=(0.25, 0.125), fits=1000):
    clock = clock or Time()
    return ToyPipeline(Denoiser(clock, call), Decoder(clock, decode, fits), FlowMatchEulerDiscreteScheduler())


def toy_sampler(num_steps=4, max_batch=8, **options):
    """A sampler of it; what its first calls did is forgotten."""
    sampler = Sampler(toy_pipeline(**options), num_inference_steps=num_steps, max_batch=max_batch)
    sampler.pipe.transformer.batches.clear()
    sampler.pipe.vae.decoded.clear()
    sampler.pipe.encoded.clear()
    sampler.pipe.vae.clock.now = 0.0
    return sampler


class ToyReward:
    """How bright an image is in its first corner; takes its time."""

    def __init__(self, clock=None, seconds=(0.0625, 0.03125)):
        self.clock, self.seconds, self.asked = clock or Time(), seconds, []

    def __call__(self, images, prompts, *, sigma):
        self.clock.takes(*self.seconds, len(images))
        self.asked.append((len(images), sigma))
        return images.mean((1, 2, 3))
