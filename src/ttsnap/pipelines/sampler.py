"""Drives any stock pipeline: one suspended call per candidate, and what they ask for run in full batches."""

from __future__ import annotations

import dataclasses
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ttsnap.pipelines.call import END, Ask, Call, Memo, is_modular, same
from ttsnap.pipelines.features import X0, Features
from ttsnap.pipelines.first_calls import first_calls
from ttsnap.pipelines.forks import Turn
from ttsnap.pipelines.limits import Limits
from ttsnap.pipelines.outputs import as_images, chosen_frames, objections, warn_of_blanks, written
from ttsnap.pipelines.probe import Blank, zeros
from ttsnap.pipelines.running import DEFAULT_BATCH, Drawing, Runner, Waiting
from ttsnap.pipelines.standing import Standing

DENOISED_PIXELS = (
    16 * 2**20
)  # of the first batches that are denoised: 32 images of 512 px, 16 of 1024, short videos alone
DECODED_PIXELS = 4 * 2**20  # of the first batches that are decoded; a decoder takes most of the memory


@dataclass(frozen=True)
class Trajectories:
    """Candidates at the same step, possibly of several prompts.

    Attributes:
        prompts: prompt of each candidate [n].
        seeds: seed of each candidate [n].
        step: denoiser calls made.
        latents: noisy latents [n, ...] in the model's dtype; [n, 0] at step 0, where the calls have not begun.
        x0: predicted clean latents after the last call [n, ...] in fp32; None at step 0.
        cells: features of that call on a grid [n, cells, channels], where a `Tap` listened.
        calls: the suspended calls [n]; None at step 0.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    step: int
    latents: Tensor
    x0: Tensor | None = None
    cells: Tensor | None = None
    calls: tuple[Call | None, ...] = ()

    def __len__(self) -> int:
        return len(self.seeds)

    def select(self, rows: Sequence[int]) -> Self:
        """Some of the candidates."""
        picked: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                picked[field.name] = value[torch.as_tensor(rows, device=value.device)]
            elif isinstance(value, tuple):
                picked[field.name] = tuple(value[row] for row in rows)
        return dataclasses.replace(self, **picked)


class Preview(ABC):
    """Makes pictures of x0 estimates in place of the full decoder.

    Attributes:
        name: what ledgers and records call it.
        until: the last call whose looks it serves (never the last call of all).
    """

    name: str
    until: float = math.inf

    @abstractmethod
    def __call__(self, sampler: Sampler, latents: Tensor) -> Tensor:
        """Pictures [n, 3, h, w] in 0..1 (fp32), of any size, of x0 estimates [n, c, h, w] as the decoder takes them."""


class Sampler(Runner):
    """Drives one stock pipeline with its own call.

    A step is one step of the pipeline's scheduler. Most make one per `num_inference_steps`; Heun and KDPM2 make
    2 n - 1, PNDM n + 1, image-to-image about `strength` x n. Their number, the noise levels, sizes and costs are found
    out when the sampler is made, by calls in which the denoiser works once.

    Args:
        pipe: any pipeline that makes one image or one video of a prompt and takes a generator; its device and dtype
            are used as they are.
        max_batch: most candidates in one denoiser call (default: 32, of videos fewer); halved when memory runs out.
        look_frames: of a video, the frames that are looked at: indices, or `first`, `middle`, `last` (all three).
        example: a prompt that the pipeline takes.
        **arguments: of the pipeline's call, by its own names.

    Raises:
        ValueError: the pipeline takes no such argument, or is none that a search can drive; the message says why.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        max_batch: int | None = None,
        look_frames: Sequence[int | str] | None = None,
        example: str = "a",
        **arguments: Any,
    ) -> None:
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max batch must be at least 1, got {max_batch}")
        super().__init__(pipe, example, arguments)
        self.prelude = ""  # what makes the stock pipeline this one, in Python
        self.preview: Preview | None = None
        self._drafting: dict[int, Sampler] = {}
        with warnings.catch_warnings():  # the search itself will say that a prompt is cut
            warnings.simplefilter("ignore")
            self.probe = first_calls(self)
            self._learned(max_batch, look_frames)

    def _learned(self, max_batch: int | None, look_frames: Sequence[int | str] | None) -> None:
        """What follows from the first calls."""
        probe, name, image = self.probe, type(self.pipe).__name__, self.probe.image
        self.height, self.width = image.shape[-2:]
        asked = {side: self.arguments[side] for side in ("height", "width") if self.arguments.get(side)}
        if any(value != getattr(self, side) for side, value in asked.items()):
            self.note(
                f"{name} makes images of {self.width} x {self.height} where {asked.get('width', self.width)} x "
                f"{asked.get('height', self.height)} was asked for"
            )
        frames = image.shape[1] if image.ndim == 5 else 0
        self.look_frames: Sequence[int] = chosen_frames(look_frames, frames)
        self.too_big = (
            f"one image of {self.width} x {self.height} does not fit into memory; try a smaller size, bfloat16 or CPU "
            "offloading"
        )
        pixels = self.height * self.width * max(1, frames)
        most = max(1, min(DEFAULT_BATCH, DENOISED_PIXELS // pixels))
        self.limits = Limits(max_batch or most, self.too_big)
        self.limits.start("decode", max(1, min(self.limits.most, DECODED_PIXELS // pixels)))
        self._encoders = {f.name: Memo(limit=16, before=self._make_room) for f in probe.encoders}
        self._parts = self._stand_ins(probe.merged)
        for memo in self.memos:
            memo.forget()  # counting chose other kernels, which round differently
        if not self._tail_holds():
            probe.tail = None
        for (model, _), reason in probe.alone.items():
            self.note(f"{name} runs one candidate at a time: its {model} {reason}")
        if self.arguments.get("negative_prompt") and not probe.guided:
            scale = "true_cfg_scale" if "true_cfg_scale" in self.taken else "guidance_scale"
            self.note(f"{name} ignores the negative prompt with these arguments; a {scale} above 1 would use it")
        for memo in self.memos:
            memo.forget()

    def with_steps(self, steps: int) -> Sampler:
        """The same pipeline with another `num_inference_steps`; nothing is loaded, and no prompt encoded, again.

        Raises:
            ValueError: the pipeline takes no number of steps, or its candidates are pushed apart.
        """
        from ttsnap.pipelines import caches

        if self.diversity:
            raise ValueError("candidates that are pushed apart keep their number of steps; prepare another session")
        arguments = {**self.arguments, "num_inference_steps": steps}
        frames, example = self.look_frames or None, self.some_prompt
        twin = Sampler(self.pipe, max_batch=self.max_batch, look_frames=frames, example=example, **arguments)
        twin.preview, twin.replicas, twin.texts = self.preview, self.replicas, self.texts
        if self.cache:
            caches.attach(twin, self.cache.text, self.cache.drafts)
        twin.prelude = self.prelude
        return twin

    def drafting(self, steps: int) -> Sampler:
        """The same pipeline for drafts of so many steps, made at the first of them.

        Raises:
            ValueError: the pipeline makes no such drafts.
        """
        if steps not in self._drafting:
            if self.cache:
                raise ValueError("drafts of fewer steps do not go with a cache; leave one of them out")
            twin = self.with_steps(steps)
            if twin.num_steps != steps:
                raise ValueError(
                    f"{type(self.pipe).__name__} makes {twin.num_steps} steps where a draft of {steps} was asked for"
                )
            self._drafting[steps] = twin
        return self._drafting[steps]

    # What it tells.

    @property
    def max_batch(self) -> int:
        """Most candidates in one denoiser call."""
        return self.limits.most

    @max_batch.setter
    def max_batch(self, limit: int) -> None:
        self.limits.set(limit)

    @property
    def sigmas(self) -> list[float]:
        """Noise level of each call [num_steps]; the x0 estimate after call s belongs to sigmas[s - 1].

        Of flow models the share of noise, 1 to 0; of others the ratio of noise to signal, sqrt((1 - abar) / abar),
        which is the scheduler's sigma: about 14 to 0.03 for Stable Diffusion. Weights of a noise-aware reward are kept
        by it, so they belong to one of the two.
        """
        return [level.noise for level in self.probe.levels]

    @property
    def timesteps(self) -> list[float]:
        """Model time of each step [num_steps], as the scheduler has it."""
        return self.probe.timesteps

    @property
    def passes(self) -> int:
        """Denoiser calls per step, such as 2 where guidance makes one of its own; in a batch of two it is 1."""
        return round(self.probe.passes)

    @property
    def check_tflop(self) -> float:
        """TFLOP of the pipeline's safety checker, if it has one; it sees finished images alone."""
        return self.probe.check_tflop

    def counted(self) -> tuple[float, float, float]:
        """TFLOP of one step, one decode and one encoded prompt, counted in the first call."""
        probe = self.probe
        return probe.step_tflop, probe.tflop["decode"] - probe.check_tflop, probe.tflop["prompt"]

    def call_options(self) -> dict[str, Any]:
        """Arguments, beside prompt and generator, with which the stock pipeline makes the same images."""
        return dict(self.arguments)

    def reproduce(self, prompt: str, seed: int, turns: Sequence[Turn] = ()) -> str:
        """A line of Python with which the stock pipeline `pipe` makes the image of a prompt and seed.

        Args:
            prompt: of the image.
            seed: of the image, or of its first ancestor.
            turns: forks that led to it.
        """
        given = {name: written(name, value) for name, value in self.arguments.items()}
        if "prompt_embeds" not in given:
            first = next(name for name in self.taken if name != "self")
            given = {"" if first == "prompt" and not is_modular(self.pipe) else "prompt": repr(prompt)} | given
        listed = ", ".join(f"{name}={text}" if name else text for name, text in given.items())
        line = f'pipe({listed}, generator=torch.Generator("cpu").manual_seed({seed}))'
        if turns and "callback_on_step_end" not in self.taken:
            return f"not by the pipeline alone: {type(self.pipe).__name__} takes no callback that could fork"
        if any(turn.back for turn in turns):
            return "not by one call of the pipeline: a fork made some of its calls again"
        if turns:
            forks = [turn.written for turn in turns]
            line = f"lineage = ttsnap.Lineage(pipe, generator, {forks})\n"
            line = f'generator = torch.Generator("cpu").manual_seed({seed}); {line}'
            line += f"pipe({listed}, generator=generator, callback_on_step_end=lineage)"
        if is_modular(self.pipe):
            line = f'{line[:-1]}, output="images")'
        before = [self.prelude, f"torch.manual_seed({seed})" if self.probe.random else ""]
        return "; ".join([*filter(None, before), line])

    # Candidates.

    def start(self, prompts: Sequence[str], seeds: Sequence[int]) -> Trajectories:
        """Candidates at step 0, whose calls have not begun; the noise of each depends on its seed alone."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds need as many prompts, got {len(prompts)}")
        self.some_prompt = next(iter(prompts), self.some_prompt)
        if self.diversity:
            self.diversity.meet(prompts, seeds)
        nothing = torch.empty(len(seeds), 0, device=self.device)
        return Trajectories(tuple(prompts), tuple(seeds), 0, nothing, calls=(None,) * len(seeds))

    @torch.no_grad()
    def advance(self, trajectories: Trajectories, to_step: int) -> Trajectories:
        """Bring all candidates to `to_step`, in full batches.

        A call only goes forward: from a step that its call has left behind, a candidate is made again from its seed,
        with the same result. In another thread than the one that began it, a new call takes up where it stands.

        Raises:
            ValueError: the step is not ahead or beyond the last, or the pipeline did not like what it was given.
            RuntimeError: the pipeline failed; the message names prompt and seed.
            MemoryError: a candidate does not fit into memory.
        """
        if not trajectories.step < to_step <= self.num_steps:
            raise ValueError(f"to_step must be in {trajectories.step + 1}..{self.num_steps}, got {to_step}")
        calls = [self._resumable(trajectories, row) for row in range(len(trajectories))]
        self.aim(calls, to_step)
        self.bring(calls)
        return self.gather(calls, to_step)

    def _resumable(self, trajectories: Trajectories, row: int) -> Call:
        call, prompt, seed = trajectories.calls[row], trajectories.prompts[row], trajectories.seeds[row]
        stands = call is not None and call.error is None and call.step == trajectories.step and call.progress.last
        if call is None or not stands:
            return self.begin(prompt, seed)
        return call if call.here else self.begin(prompt, seed, standing=call.standing())

    def aim(self, calls: Sequence[Call], step: int) -> None:
        """Let calls go on to a step (END: to their end)."""
        for call in calls:
            call.progress.target = step

    def gather(self, calls: Sequence[Call], step: int) -> Trajectories:
        """Calls that stand at a step as trajectories."""
        prompts, seeds = tuple(call.prompt for call in calls), tuple(call.seed for call in calls)
        lasts = [call.progress.last for call in calls]
        for call, last in zip(calls, lasts, strict=True):
            if last is None or call.step != step:
                raise RuntimeError(
                    f"{type(self.pipe).__name__}, prompt {call.prompt!r}, seed {call.seed}: the call ended after "
                    f"{call.step} of {self.num_steps} steps"
                )
        if self.probe.copies:
            empty = torch.empty(len(calls), 0, device=self.device)
            return Trajectories(prompts, seeds, step, empty, None, None, tuple(calls))
        following = [last.following for last in lasts if last]
        latents = torch.cat(following) if self.probe.batched else torch.stack(following)
        if step == self.num_steps:
            x0 = latents.float()
        else:
            cleaned = [last.clean for last in lasts if last]
            x0 = torch.cat(cleaned) if self.probe.batched else torch.stack(cleaned)
        heard = [call.cells for call in calls if call.cells is not None and call.heard == step - 1]
        cells = torch.cat(heard) if len(heard) == len(calls) and heard else None
        return Trajectories(prompts, seeds, step, latents, x0, cells, tuple(calls))

    # Pictures.

    def preview_at(self, step: int) -> Preview | None:
        """What makes the pictures of looks after `step` calls; None: the full decoder, as for every finished image."""
        preview = self.preview
        return preview if preview and step < self.num_steps and step <= preview.until else None

    @torch.no_grad()
    def look(self, trajectories: Trajectories) -> Tensor:
        """Images [n, 3, h, w] (videos [n, frames, 3, h, w]) of candidates; of finished ones what their calls return.

        Of x0 estimates they are what the pipeline makes of these, or a preview's pictures, of its own size. The
        pipeline's safety checker, if it has one, sees finished images alone; a warning says which it made black.
        """
        step, x0 = trajectories.step, trajectories.x0
        if step == self.num_steps:
            return self._finished(trajectories)
        if x0 is None:
            raise ValueError(f"{type(self.pipe).__name__} shows no x0 estimates; use best-of-n")
        if preview := self.preview_at(step):
            spatial = self.spatial(x0, trajectories.prompts, trajectories.seeds, step)
            return torch.cat(self.limits.run("previews", len(x0), lambda rows: preview(self, spatial[rows])))
        return self._drawn(self._drawings(x0, trajectories.prompts, trajectories.seeds, step))

    def _finished(self, trajectories: Trajectories) -> Tensor:
        calls: list[Waiting] = []
        for row, call in enumerate(trajectories.calls):
            stands = call is not None and call.here and call.error is None and call.progress.last is not None
            if call is None or not stands or call.step != self.num_steps:
                prompt, seed = trajectories.prompts[row], trajectories.seeds[row]
                if self.exact and trajectories.x0 is not None:
                    calls += self._drawings(trajectories.x0[row : row + 1], [prompt], [seed], self.num_steps, False)
                    continue
                call = self.begin(prompt, seed)
            call.progress.target = END
            calls.append(call)
        return self._drawn(calls)

    def _drawn(self, drawings: Sequence[Waiting]) -> Tensor:
        """Bring calls or drawings to their end, and see what they made."""
        self.bring(drawings)
        images = []
        for drawing in drawings:
            warn_of_blanks(objections(drawing.output) or [False], [drawing.prompt], [drawing.seed])
            images.append(as_images(drawing.output, self.device))
            drawing.output = None
        made = torch.cat(images)
        if not bool(torch.isfinite(made).all()):
            wrong = next(d for d, image in zip(drawings, images, strict=True) if not bool(torch.isfinite(image).all()))
            raise ValueError(
                f"prompt {wrong.prompt!r}, seed {wrong.seed}: the picture at step {wrong.step} of {self.num_steps} is "
                "not finite; try float32 or bfloat16"
            )
        return made

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Images [n, 3, h, w] (videos [n, frames, 3, h, w]) in 0..1, fp32, of predicted clean latents [n, ...]."""
        unnamed = [self.some_prompt] * len(x0), [0] * len(x0)
        return self._drawn(self._drawings(x0, *unnamed, self.num_steps))

    def _drawings(
        self, x0: Tensor, prompts: Sequence[str], seeds: Sequence[int], step: int, unchecked: bool = True
    ) -> list[Waiting]:
        """What makes pictures of x0 estimates [n, ...]: operations that are known, or else calls."""
        tail = self.probe.tail
        if tail is None:
            return [
                self._tail_call(x0[row : row + 1], prompt, seed, unchecked=unchecked)
                for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            ]
        dtype = self._latents_dtype()
        rows = torch.split(x0.to(dtype), 1) if self.probe.batched else x0.to(dtype).unbind(0)
        return [
            Drawing(tail.run(row), prompt, seed, step) for row, prompt, seed in zip(rows, prompts, seeds, strict=True)
        ]

    def _latents_dtype(self) -> torch.dtype:
        result = self.probe.result
        values = result if isinstance(result, tuple) else tuple(result.values())
        return next(value.dtype for value in values if getattr(value, "shape", None) == self.probe.sample)  # type: ignore[no-any-return]

    def _tail_call(self, x0: Tensor, prompt: str, seed: int, *, unchecked: bool = False) -> Call:
        """A call that makes a picture of an x0 estimate [1, ...]: its steps are not made, and the last returns it."""
        x0 = x0 if self.probe.batched else x0[0]
        result = self.probe.result

        def put(value: Any) -> Any:
            if getattr(value, "shape", None) == self.probe.sample:
                return x0.to(value.device, value.dtype)
            return zeros(value)

        values = tuple(map(put, result if isinstance(result, tuple) else result.values()))
        call = self.begin(prompt, seed, standing=Standing(prompt, seed, self.num_steps, values), unchecked=unchecked)
        call.progress.target = END
        return call

    @torch.no_grad()
    def spatial(
        self, x0: Tensor, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None, step: int = 0
    ) -> Tensor:
        """Predicted clean latents as the pipeline hands them to its decoder [n, channels, h, w].

        Raises:
            ValueError: it hands it no pictures.
        """
        texts = prompts or [self.some_prompt] * len(x0)
        found = []
        for drawing in self._drawings(x0, texts, seeds or [0] * len(x0), step):
            self.go_on([drawing])
            if drawing.error:
                raise self.explained(drawing)
            latents = self._to_decoder(drawing.ask)
            if latents is None:
                raise ValueError(f"{type(self.pipe).__name__} has no previews; its looks need the full decoder")
            found.append(latents)
        return torch.cat(found)

    @staticmethod
    def _to_decoder(ask: Ask | None) -> Tensor | None:
        """The latents [1, channels, h, w] in what is asked of a decoder."""
        if ask is None or ask.method != "decode":
            return None
        latents = next((value for value in ask.tree.values() if isinstance(value, Tensor)), None)
        if latents is not None and latents.ndim == 5 and latents.shape[2] == 1:
            latents = latents[:, :, 0]
        return latents if latents is not None and latents.ndim == 4 else None

    def normalised(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser sees them, of latents [n, channels, h, w] as the decoder takes them."""
        config = self.pipe.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:
            shift, scale = (torch.tensor(v, device=latents.device).reshape(1, -1, 1, 1) for v in (mean, std))
            return (latents - shift) / scale
        scaled: Tensor = (latents - (getattr(config, "shift_factor", None) or 0.0)) * getattr(
            config, "scaling_factor", 1.0
        )
        return scaled

    @torch.no_grad()
    def decode_spatial(self, latents: Tensor) -> Tensor:
        """Images [n, 3, h, w] in 0..1 (fp32) of latents [n, channels, h, w] of any size, as the decoder takes them."""
        vae = self.pipe.vae
        way = self._asked_of_decoder()

        def work(rows: slice) -> Tensor:
            part = latents[rows].to(vae.dtype)
            answer = self.work(
                way.filled({**way.tree, self._place_of(way): part[:, :, None] if self._flat_frames else part})
            )
            made = answer[0] if isinstance(answer, tuple) else answer.sample
            made = made[:, :, 0] if made.ndim == 5 else made
            unit: Tensor = (made.float() / 2 + 0.5).clamp(0, 1)
            return unit

        return torch.cat(self.limits.run("decode", len(latents), work))

    @property
    def draws_pictures(self) -> bool:
        """Whether the pipeline hands its decoder latents of one picture, from which previews can be made."""
        ask = next((forward.ask for forward in self.probe.forwards if forward.ask.method == "decode"), None)
        if ask is None or not hasattr(self.pipe, "vae"):
            return False
        shape = ask.tree[self._place_of(ask)].shape
        return len(shape) == 4 or (len(shape) == 5 and shape[2] == 1)

    def _asked_of_decoder(self) -> Ask:
        forward = next((f for f in self.probe.forwards if f.ask.method == "decode"), None)
        if forward is None or not hasattr(self.pipe, "vae"):
            raise ValueError(f"{type(self.pipe).__name__} has no small preview; its looks need the full decoder")
        return forward.ask

    def _place_of(self, ask: Ask) -> Any:
        return next(name for name, value in ask.tree.items() if hasattr(value, "shape"))

    @property
    def _flat_frames(self) -> bool:
        """Whether the decoder takes a picture as a video of one frame."""
        ask = self._asked_of_decoder()
        return len(ask.tree[self._place_of(ask)].shape) == 5

    def encode_spatial(self, images: Tensor) -> Tensor:
        """Latents [n, channels, h, w] of images [n, 3, h, w] in 0..1; what `decode_spatial` turns back.

        Raises:
            ValueError: the decoder has no such encoder.
        """
        vae: Any = getattr(self.pipe, "vae", None)
        if not callable(getattr(vae, "encode", None)) or self._flat_frames:
            raise ValueError(f"{type(self.pipe).__name__} has no linear preview; use full, tiny or small")
        found = vae.encode((images * 2 - 1).to(self.device, vae.dtype))
        return found.latents if hasattr(found, "latents") else found.latent_dist.mode()  # type: ignore[no-any-return]

    def shown(self, images: Tensor) -> Tensor:
        """The part of decoded images that is judged: all; of videos, the frames that are looked at."""
        return images[:, list(self.look_frames)] if self.look_frames else images

    def features(self, trajectories: Trajectories) -> Features:
        """What the denoiser knows of the candidates after their last call, for rewards that read it.

        Raises:
            ValueError: nothing listened to that call.
        """
        cells, x0, tap = trajectories.cells, trajectories.x0, self.tap
        if tap is None or x0 is None or (cells is None and tap.hidden):
            raise ValueError("no features were kept of these candidates; attach the rewards that read them first")
        if any(place.module == X0 for place in tap.places):
            latents = self.spatial(x0, trajectories.prompts, trajectories.seeds, trajectories.step)
            cells = tap.with_x0(cells, latents, len(trajectories.prompts))
        assert cells is not None
        return Features(cells, tap.words(trajectories.prompts), x0)

    # What was taken down of the way to a picture must hold for every candidate.

    exact = True  # whether a picture can be made of last latents without their call

    @torch.no_grad()
    def _tail_holds(self) -> bool:
        """Whether calls of two seeds and what was taken down do the same with last latents.

        Sees also whether a call that is given last latents does with them what the one did that made them.
        """
        probe = self.probe
        if probe.copies:
            self.exact = False
            return False
        whole = probe.latents if probe.batched else probe.latents[None]
        try:
            one, other = (self._tail_asks(self._tail_call(whole, self.some_prompt, seed)) for seed in (0, 1))
        except Exception:
            self.exact = False
            return False
        draws = probe.alone.keys() & {f.ask.kind for f in probe.forwards if f.ask.method == "decode"}
        self.exact = not draws and (probe.decoded is None or _alike(one[:1], [probe.decoded]))
        probe.decoded = None
        if not self.exact:
            self.note(
                f"{type(self.pipe).__name__} draws noise when it decodes, or decodes more than its last latents: early "
                "looks show about what it would make of an x0 estimate; finished images are exact"
            )
            return False
        if probe.tail is None:
            return False
        ours = self._tail_asks(Drawing(probe.tail.run(probe.latents), self.some_prompt, 0, self.num_steps))
        return _alike(ours, one) and _alike(ours, other)

    def _tail_asks(self, call: Waiting) -> list[Ask]:
        """What is asked for on the way from the last latents to the picture, answered by noise; at last the picture."""
        asks: list[Ask] = []
        while True:
            self.go_on([call])
            if call.error:
                raise call.error
            if call.ask is None:
                break
            after = isinstance(call, Drawing) or call.step >= self.num_steps
            if not after:
                call.answer(self.work(call.ask))
                continue
            asks.append(call.ask)
            call.answer(_noise(self.probe.like(call.ask).answer))
        asks.append(Ask("", "", (as_images(call.output, self.device),), {}))
        return asks


def _noise(answer: Any) -> Any:
    """An answer of the same random numbers every time, in the place of one without data."""

    def fill(x: Any) -> Any:
        if not isinstance(x, Blank) or not x.dtype.is_floating_point:
            return zeros(x)
        generator = torch.Generator().manual_seed(1)
        return torch.randn(x.shape, generator=generator).to(x.device, x.dtype)

    return tree_map(fill, answer)


def _alike(mine: Sequence[Ask], theirs: Sequence[Ask]) -> bool:
    """Whether the same was asked for."""

    def tree(ask: Ask) -> Any:
        return {name: value for name, value in ask.tree.items() if not isinstance(value, torch.Generator)}

    return len(mine) == len(theirs) and all(
        a.kind == b.kind and same(tree(a), tree(b)) for a, b in zip(mine, theirs, strict=True)
    )


__all__ = ["Drawing", "Preview", "Sampler", "Trajectories"]
