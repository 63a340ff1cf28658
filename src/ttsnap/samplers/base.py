"""What all samplers share: trajectories, prompts encoded once, full batches, decoding, running out of memory."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ttsnap.diversity.negtome import Repulsion
    from ttsnap.samplers.features import Features, Tap
    from ttsnap.samplers.previews import Preview


class Declined(ValueError):
    """An adapter cannot drive this pipeline exactly, because of its scheduler or one of its parts.

    Adapters raise it in their constructor, before any work; the pipeline then runs with its own `__call__` instead
    (`ttsnap.samplers.any_pipeline`), which is slower and serves all. A wrong option is a plain ValueError.
    """


@dataclass(frozen=True)
class Trajectories:
    """Candidates at the same step, possibly of several prompts.

    Attributes:
        prompts: prompt of each candidate [n].
        seeds: seed of each candidate [n].
        step: denoiser calls made.
        latents: noisy latents [n, ...] in the model's dtype.
        x0: predicted clean latents after the last call [n, ...] in fp32; None at step 0.
        cells: features of that call on a grid [n, cells, channels], where a `Tap` listened.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    step: int
    latents: Tensor
    x0: Tensor | None = None
    cells: Tensor | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    def select(self, rows: Sequence[int]) -> Self:
        """Some of the candidates."""
        index = torch.as_tensor(rows, device=self.latents.device)
        return self._pick(lambda tensor: tensor[index], lambda items: tuple(items[i] for i in rows))

    def row(self, row: int) -> Self:
        """One candidate as a view, without copying."""
        return self.part(slice(row, row + 1))

    def part(self, rows: slice) -> Self:
        """Neighbouring candidates as a view, without copying."""
        return self._pick(lambda tensor: tensor[rows], lambda items: items[rows])

    def to(self, device: Any) -> Self:
        """A copy elsewhere, which keeps nothing of a batch alive that these are a part of."""
        return self._pick(lambda tensor: tensor.to(device, copy=True), lambda items: items)

    def _pick(self, tensor: Callable[[Tensor], Tensor], items: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Self:
        picked: dict[str, Any] = {}
        for name, value in self._fields().items():
            if isinstance(value, Tensor):
                picked[name] = tensor(value)
            elif isinstance(value, tuple):
                picked[name] = items(value)
        return dataclasses.replace(self, **picked)

    def tensors(self) -> list[Tensor]:
        """Everything that takes memory."""
        return [value for value in self._fields().values() if isinstance(value, Tensor)]

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @staticmethod
    def concat(parts: Sequence[AnyTrajectories]) -> AnyTrajectories:
        """Several groups at the same step as one."""
        if len({part.step for part in parts}) != 1:
            raise ValueError(f"trajectories must be at one step to be joined, got {[part.step for part in parts]}")
        joined: dict[str, Any] = {}
        for name, value in parts[0]._fields().items():
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values):
                joined[name] = None  # what some lack, such as features, the whole lacks
            elif isinstance(value, Tensor):
                joined[name] = torch.cat(values)
            elif isinstance(value, tuple):
                joined[name] = tuple(itertools.chain(*values))
        return dataclasses.replace(parts[0], **joined)


AnyTrajectories = TypeVar("AnyTrajectories", bound=Trajectories)


@dataclass
class Batches:
    """Does work in equal batches of at most `limit`, and halves that when memory runs out.

    Attributes:
        limit: most items in one batch; stays halved once memory ran out.
        too_big: what to say when not even one item fits.
    """

    limit: int
    too_big: str

    def __call__(self, count: int, work: Callable[[slice], Any]) -> list[Any]:
        """Results of `work`, one per batch, in order.

        Raises:
            MemoryError: not even one item fits into memory.
        """
        results: list[Any] = []
        start = 0
        while start < count:
            batches = -(-(count - start) // self.limit)
            size = -(-(count - start) // batches)
            try:
                results.append(work(slice(start, start + size)))
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise MemoryError(self.too_big) from error
            else:
                start += size
                continue
            # Outside the handler, where the error no longer holds on to the tensors of the failed batch.
            self.limit = size // 2
            warnings.warn(f"out of memory: going on with at most {self.limit} in a batch", stacklevel=3)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results


class PipelineSampler(ABC):
    """Drives one stock pipeline, in whatever way.

    Args:
        pipe: the stock pipeline; its device and dtype are used as they are.
        num_steps: denoiser calls of a finished image.
        height: image height in pixels.
        width: image width in pixels.
        max_batch: most candidates in one denoiser call, and images in one decode; each is halved on its own when its
            memory runs out.
    """

    default_max_batch = 32
    look_frames: Sequence[int] = ()  # of videos, the frames that are looked at

    def __init__(self, pipe: Any, *, num_steps: int, height: int, width: int, max_batch: int | None = None) -> None:
        if num_steps < 1:
            raise ValueError(f"steps must be at least 1, got {num_steps}")
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max batch must be at least 1, got {max_batch}")
        self.pipe = pipe
        device: torch.device = pipe._execution_device  # not where the weights of an offloaded model wait
        self.device = torch.device("cpu") if device.type == "cpu" else device  # `cpu:0` is another name for it
        self.num_steps = num_steps
        self.height = height
        self.width = width
        self.too_big = (
            f"one image of {width} x {height} does not fit into memory; try a smaller size, bfloat16 or CPU offloading"
        )
        self._calls = Batches(max_batch or self.default_max_batch, self.too_big)
        self._decodes = Batches(max_batch or self.default_max_batch, self.too_big)
        self._previews = Batches(max_batch or self.default_max_batch, self.too_big)
        self._encoded: dict[Hashable, Any] = {}
        self._ran = False  # whether the denoiser ran since prompts were encoded
        self.notes: list[str] = []  # what whoever sees a result should know
        self.on_calls: Callable[[int], None] | None = None
        self.diversity: Repulsion | None = None  # see ttsnap.diversity.negtome.applied
        self.tap: Tap | None = None  # see ttsnap.samplers.features.attach
        self.preview: Preview | None = None  # see ttsnap.samplers.previews.attach

    @property
    def max_batch(self) -> int:
        """Most candidates in one denoiser call."""
        return self._calls.limit

    @max_batch.setter
    def max_batch(self, limit: int) -> None:
        self._calls.limit = self._decodes.limit = self._previews.limit = limit

    @property
    @abstractmethod
    def sigmas(self) -> list[float]:
        """Noise level of each call [num_steps]; the x0 estimate after call s belongs to sigmas[s - 1].

        Of flow models the share of noise, 1 to 0; of others the ratio of noise to signal, sqrt((1 - abar) / abar),
        which is the scheduler's sigma: about 14 to 0.03 for Stable Diffusion. Weights of a noise-aware reward are kept
        by it, so they belong to one of the two.
        """

    @property
    def timesteps(self) -> list[float]:
        """Model time of each call [num_steps], 0..1000: of flow models 1000 sigma, others say their own."""
        return [1000 * sigma for sigma in self.sigmas]

    @abstractmethod
    def start(self, prompts: Sequence[str], seeds: Sequence[int]) -> Trajectories:
        """Candidates at step 0; the noise of each depends on its seed alone."""

    @abstractmethod
    def advance(self, trajectories: Trajectories, to_step: int) -> Trajectories:
        """Bring all candidates to `to_step` denoiser calls.

        Raises:
            ValueError: the step is not ahead, or beyond the last.
            MemoryError: not even one candidate fits into memory.
        """

    @abstractmethod
    def decode(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 (fp32) of predicted clean latents; of videos [n, frames, 3, h, w]."""

    @torch.no_grad()
    def look(self, trajectories: Trajectories) -> Tensor:
        """What a look at candidates shows: `decode` of their x0 estimates, or a preview's pictures, of its own size."""
        assert trajectories.x0 is not None
        x0, preview = trajectories.x0, self.preview_at(trajectories.step)
        if preview is None:
            return self.decode(x0)
        return torch.cat(self._previews(len(x0), lambda rows: preview(self, x0[rows])))

    def preview_at(self, step: int) -> Preview | None:
        """What makes the pictures of looks after `step` calls; None: the full decoder, as for every finished image."""
        preview = self.preview
        return preview if preview and step < self.num_steps and step <= preview.until else None

    # What previews need; families with latents other than [n, channels, height, width] say how.

    spatial_unit = 1  # latents that `decode_spatial` takes are so many times a whole number high and wide

    def spatial(self, x0: Tensor) -> Tensor:
        """Predicted clean latents as a picture [n, channels, h, w], normalised as the denoiser sees them.

        Raises:
            ValueError: this family's latents are no pictures.
        """
        if x0.ndim != 4:
            raise ValueError(f"{type(self.pipe).__name__} has no previews yet; its looks need the full decoder")
        return x0

    def decode_spatial(self, latents: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 (fp32) of normalised latents [n, channels, h, w] of any size."""
        return self.decode(latents)

    def encode_spatial(self, images: Tensor) -> Tensor:
        """Normalised latents [n, channels, h, w] of images [n, 3, h, w] in 0..1; what `decode_spatial` turns back.

        Raises:
            ValueError: the decoder has no such encoder.
        """
        vae, config = self.pipe.vae, self.pipe.vae.config
        if not hasattr(config, "scaling_factor") or getattr(config, "latents_mean", None) is not None:
            raise ValueError(f"{type(self.pipe).__name__} has no linear preview; use full, tiny or small")
        found = vae.encode((images * 2 - 1).to(self.device, vae.dtype))
        latents = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor  # type: ignore[no-any-return]

    def shown(self, images: Tensor) -> Tensor:
        """The part of decoded images that is judged: all; of videos, the frames that are looked at."""
        return images

    def features(self, trajectories: Trajectories) -> Features:
        """What the denoiser knows of the candidates after their last call, for rewards that read it.

        Raises:
            ValueError: nothing listened to that call.
        """
        from ttsnap.samplers.features import Features

        if self.tap is None or trajectories.cells is None:
            raise ValueError("no features were kept of these candidates; attach the rewards that read them first")
        return Features(trajectories.cells, self.tap.words(trajectories.prompts), trajectories.x0)

    def text(self, prompt: str) -> Any:
        """Encode a prompt ahead of its candidates, if that can be."""
        return None

    @property
    def check_tflop(self) -> float:
        """TFLOP of what a finished image goes through beside decoding: a safety checker, which sees no early looks."""
        return 0.0

    def counted(self) -> tuple[float, float, float] | None:
        """TFLOP of one call, one decode and one encoded prompt, if the sampler counts for itself."""
        return None

    def call_options(self) -> dict[str, Any]:
        """Arguments, beside prompt and generator, with which the stock pipeline makes the same images."""
        return {"height": self.height, "width": self.width, "num_inference_steps": self.num_steps}

    def reproduce(self, prompt: str, seed: int) -> str:
        """A line of Python with which the stock pipeline `pipe` makes the image of a prompt and seed."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.call_options().items())
        return f'pipe({prompt!r}, {options}, generator=torch.Generator("cpu").manual_seed({seed}))'

    def forget_prompts(self) -> None:
        """Drop the cached prompt encodings, and which candidates belong together."""
        self._encoded.clear()
        if self.diversity:
            self.diversity.forget()
        if self.tap:
            self.tap.forget_prompts()

    def group(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Say which candidates belong together before some of them start; it only matters with diversity."""
        if self.diversity:
            self.diversity.lead(prompts, seeds)

    def check_step(self, trajectories: Trajectories, to_step: int) -> None:
        """ValueError where a step is not ahead, or beyond the last."""
        if not trajectories.step < to_step <= self.num_steps:
            raise ValueError(f"to_step must be in {trajectories.step + 1}..{self.num_steps}, got {to_step}")


class BaseSampler(PipelineSampler):
    """Drives one model family in full batches. It adds how to encode, draw noise, call the denoiser and step."""

    # What a family provides.

    @abstractmethod
    def noise(self, seed: int) -> Tensor:
        """Starting latents [1, ...] of a seed, drawn as the stock pipeline draws them."""

    @abstractmethod
    def encode(self, prompt: str) -> Any:
        """Everything the denoiser needs to know of a prompt, encoded once."""

    @abstractmethod
    def call(self, latents: Tensor, encoded: list[Any], index: int) -> tuple[Tensor, Tensor]:
        """One denoiser call (0-based `index`) on a batch: the next latents and the x0 estimates (fp32)."""

    def call_after(
        self, latents: Tensor, encoded: list[Any], index: int, previous: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`call`, with the x0 estimates of the call before (fp32; None at the first), which multistep solvers need."""
        return self.call(latents, encoded, index)

    @abstractmethod
    def decode_batch(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 (fp32) of one batch of predicted clean latents."""

    # What all families share.

    def text(self, prompt: str) -> Any:
        """The encoded prompt, from the cache after the first time."""
        if self._ran and prompt not in self._encoded and hasattr(self.pipe, "_offload_device"):
            self.pipe.maybe_free_model_hooks()  # or the text encoders would come to where the denoiser still is
            self._ran = False
        return self.kept(prompt, lambda: self.encode(prompt))

    def kept(self, key: Hashable, work: Callable[[], Any]) -> Any:
        """The result of `work`, done once (without gradients) until the prompts are forgotten.

        A string key is a prompt; a family keeps what all prompts share, such as a negative prompt, under tuples.
        """
        if key not in self._encoded:
            with torch.no_grad():
                self._encoded[key] = work()
        return self._encoded[key]

    def dtype_of(self, model: Any) -> torch.dtype:
        """The dtype of a part of the pipeline; asking the part walks through all its modules, every time."""
        dtype: torch.dtype = self.kept(("dtype", id(model)), lambda: model.dtype)
        return dtype

    @torch.no_grad()
    def start(self, prompts: Sequence[str], seeds: Sequence[int]) -> Trajectories:
        """Candidates at step 0; the noise of each depends on its seed alone."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds need as many prompts, got {len(prompts)}")
        if self.diversity:
            self.diversity.meet(prompts, seeds)
        noise = {seed: self.noise(seed) for seed in dict.fromkeys(seeds)}
        return Trajectories(tuple(prompts), tuple(seeds), 0, torch.cat([noise[seed] for seed in seeds]))

    @torch.no_grad()
    def advance(self, trajectories: Trajectories, to_step: int) -> Trajectories:
        """Bring all candidates to `to_step` denoiser calls, in full batches.

        Raises:
            ValueError: the step is not ahead, or beyond the last.
            MemoryError: not even one candidate fits into memory.
        """
        self.check_step(trajectories, to_step)
        encoded = [self.text(prompt) for prompt in trajectories.prompts]
        self._ran = True

        def work(rows: slice) -> list[Tensor]:
            latents, texts = trajectories.latents[rows], encoded[rows]
            x0 = None if trajectories.x0 is None else trajectories.x0[rows]
            heard = list[Tensor]()
            for index in range(trajectories.step, to_step):
                last = index == to_step - 1
                with self.tap.listen(trajectories.prompts[rows]) if self.tap and last else nullcontext(heard) as heard:
                    if self.diversity:
                        who = trajectories.prompts[rows], trajectories.seeds[rows]
                        latents, x0 = self.diversity.call(self, latents, texts, index, *who)
                    else:
                        latents, x0 = self.call_after(latents, texts, index, x0)
                if self.on_calls:
                    self.on_calls(len(texts))
            assert x0 is not None
            return [latents, x0, *heard]

        parts = self._calls(len(trajectories), work)
        latents, x0, *cells = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return dataclasses.replace(
            trajectories, step=to_step, latents=latents, x0=x0, cells=cells[0] if cells else None
        )

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 (fp32) of predicted clean latents."""
        return torch.cat(self._decodes(len(x0), lambda rows: self.decode_batch(x0[rows])))


def check_size(height: int, width: int, unit: int) -> None:
    """ValueError where an image is not made of whole units (pixels per latent patch)."""
    if height % unit or width % unit or min(height, width) < unit:
        raise ValueError(f"width and height must be multiples of {unit}, got {width} x {height}")


def warn_if_cut(tokenizer: Any, prompt: str, limit: int, name: str) -> None:
    """Warn that the end of a prompt is not read because an encoder takes no more tokens."""
    if tokenizer is None:
        return
    ids = tokenizer(prompt, truncation=False, add_special_tokens=True, verbose=False)["input_ids"]
    if len(ids) > limit:
        unread = tokenizer.decode(ids[limit - 1 : -1])
        warnings.warn(f"{name} reads {limit} tokens, the prompt has {len(ids)}; not read: {unread!r}", stacklevel=2)


__all__ = ["BaseSampler", "Batches", "Declined", "PipelineSampler", "Trajectories", "check_size", "warn_if_cut"]
