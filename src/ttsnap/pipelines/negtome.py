"""Negative token merging (Singh et al. 2024, arXiv 2412.01339): candidates move away from the first of their prompt.

While the noise is high, each image token after an attention is pushed away from its best match among the tokens that
the reference, the first candidate of the same prompt, has there. The reference itself is left as it is, to the last
bit. Only the prompt, the seed and the reference's seed decide an image, not the others in the batch: where the
reference is not in a batch (split off, or pruned), it runs along in it, which costs calls that `extra_calls` counts.

With `repel` (Rethinking Test Time Scaling for Flow-Matching Generative Models, arXiv 2511.22242) there is no reference:
every image is pushed from the best match among the tokens of all others of its prompt that share its batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ttsnap.pipelines.negtome_sites import ALPHAS, sites_of
from ttsnap.pipelines.sampler import Sampler

if TYPE_CHECKING:
    from ttsnap.pipelines.call import Ask, Call


@dataclass(frozen=True)
class Negtome:
    """The published parameters; the defaults are the authors'.

    Attributes:
        merging_alpha: how far a token is pushed; 0 changes nothing (default: 0.9 on FLUX, 1.9 on SDXL).
        merging_threshold: least cosine similarity to the best match for a token to be pushed.
        merging_dropout: share of tokens left alone, drawn from the candidate's seed.
        t_start: highest timestep (0..1000) at which tokens are pushed.
        t_end: lowest.
        num_joint_blocks: the first so many joint blocks of FLUX take part; -1: all.
        num_single_blocks: the same for single blocks.
        blocks: parts of a UNet that take part: down_blocks, mid_block, up_blocks, joined by +.
        min_attn_dim: attentions of a UNet over smaller pictures (in latent pixels) take no part.
        repel: from all other images of the prompt in the batch, not from the first alone.
    """

    merging_alpha: float | None = None
    merging_threshold: float = 0.65
    merging_dropout: float = 0.0
    t_start: float = 1000.0
    t_end: float = 900.0
    num_joint_blocks: int = -1
    num_single_blocks: int = -1
    blocks: str = "up_blocks"
    min_attn_dim: int = 32
    repel: bool = False

    def __post_init__(self) -> None:
        if self.merging_alpha is not None and not math.isfinite(self.merging_alpha):
            raise ValueError(f"merging_alpha must be a finite number, got {self.merging_alpha}")
        if not -1 <= self.merging_threshold <= 1:
            raise ValueError(f"merging_threshold must be in -1..1, got {self.merging_threshold}")
        if not 0 <= self.merging_dropout <= 1:
            raise ValueError(f"merging_dropout must be in 0..1, got {self.merging_dropout}")
        if not 0 <= self.t_end <= self.t_start <= 1000:
            raise ValueError(f"t_end and t_start must ascend within 0..1000, got {self.t_end:g} and {self.t_start:g}")
        for name in ("num_joint_blocks", "num_single_blocks"):
            if getattr(self, name) < -1:
                raise ValueError(f"{name} must be -1 (all) or more, got {getattr(self, name)}")
        if wrong := set(self.blocks.split("+")) - {"down_blocks", "mid_block", "up_blocks"}:
            raise ValueError(f"blocks are down_blocks, mid_block, up_blocks, joined by +, got {', '.join(wrong)!r}")

    def active(self, timestep: float) -> bool:
        """Whether tokens are pushed at a timestep (0..1000)."""
        return self.merging_alpha != 0 and self.t_end <= round(timestep, 3) <= self.t_start

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object, from which it can be made again."""
        return {"name": "negtome", **asdict(self)}


REPEL = Negtome(merging_alpha=3.0, merging_threshold=0.7, merging_dropout=0.2, repel=True)


KNOWN = ("negtome", "repel")


def parse(name: str | None, options: str | None = None) -> Negtome | None:
    """The parameters that a name and `merging_alpha=1.2,t_end=800` describe; None without a name.

    Args:
        name: `negtome` or its variant `repel`.
        options: parameters that differ from the defaults.

    Raises:
        ValueError: an unknown name or parameter, or a value outside its range.
    """
    if name is None:
        if options is not None:
            raise ValueError("--diversity-options need --diversity, such as --diversity negtome")
        return None
    if name not in KNOWN:
        raise ValueError(f"unknown diversity {name!r}; known are {', '.join(KNOWN)}")
    return replace(REPEL if name == "repel" else Negtome(), **convert(options or ""))


def convert(text: str) -> dict[str, Any]:
    """Parameters of `merging_alpha=1.2,t_end=800`.

    Raises:
        ValueError: not of that form, or no such parameter.
    """
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(Negtome)} | {"merging_alpha": float}
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in kinds:
            raise ValueError(f"negtome has no parameter {name!r}; it has {', '.join(kinds)}")
        try:
            found[name] = {"true": True, "false": False}[value.lower()] if kinds[name] is bool else kinds[name](value)
        except (KeyError, ValueError):
            example = {bool: "true", int: "1"}.get(kinds[name], "0.5")
            raise ValueError(f"{name} takes a value such as {name}={example}, got {value!r}") from None
    return found


def push(tokens: Tensor, reference: Tensor, parameters: Negtome, kept: Tensor | None = None) -> Tensor:
    """(1 + alpha) x - alpha m where the cosine similarity of x to its best match m exceeds the threshold, else x.

    Args:
        tokens: x [n, t, d].
        reference: tokens to be pushed from [n, t', d].
        parameters: alpha and threshold.
        kept: which tokens may be pushed [n, t] (default: all).

    Returns:
        Tokens [n, t, d] in the dtype of `tokens`.
    """
    alpha = parameters.merging_alpha
    assert alpha is not None
    best, index = best_match(F.normalize(tokens.float(), dim=-1), F.normalize(reference.float(), dim=-1))
    match = reference.gather(1, index[..., None].expand(-1, -1, reference.shape[-1]))
    pushed = best > parameters.merging_threshold
    if kept is not None:
        pushed = pushed & kept
    return torch.where(pushed[..., None], (1 + alpha) * tokens - alpha * match, tokens)


def best_match(tokens: Tensor, others: Tensor, close: int = 8) -> tuple[Tensor, Tensor]:
    """Greatest cosine similarity [n, t] of unit vectors [n, t, d] among others [n, t', d], and whose it is [n, t].

    The products choose the `close` most alike, their distances, 2 - 2 cos, decide: near 1 a cosine in fp32 cannot tell
    angles below 5e-4 apart, and then the rounding of the batch would.
    """
    ranked = (tokens @ others.transpose(1, 2)).topk(min(close, others.shape[1]), dim=-1).indices
    distances = [
        (tokens - others.gather(1, ranked[..., k, None].expand(-1, -1, others.shape[-1]))).square().sum(-1)
        for k in range(ranked.shape[-1])
    ]
    nearest, which = torch.stack(distances, dim=-1).min(dim=-1)
    return 1 - nearest / 2, ranked.gather(-1, which[..., None])[..., 0]


@dataclass
class Repulsion:
    """Negative token merging at work in one sampler.

    Attributes:
        parameters: what is done.
        references: seed of each prompt's reference: its first candidate.
        extra_calls: denoiser calls of references that ran along, beyond those of the candidates.
    """

    parameters: Negtome
    references: dict[str, int] = field(default_factory=dict)
    extra_calls: int = 0
    _asks: dict[tuple[str, int, int, int], Ask] = field(default_factory=dict, repr=False)
    _shadows: dict[tuple[str, int], Call] = field(default_factory=dict, repr=False)

    def lead(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Make the first of these candidates of each prompt its reference."""
        self.references |= dict(zip(reversed(prompts), reversed(seeds), strict=True))

    def meet(self, prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """The same for prompts that have no reference yet."""
        for prompt, seed in zip(prompts, seeds, strict=True):
            self.references.setdefault(prompt, seed)

    def forget(self) -> None:
        """Drop the references and where they stand."""
        self.references.clear()
        self._asks.clear()
        self._shadows.clear()

    def active(self, sampler: Sampler, call: Call) -> bool:
        """Whether tokens are pushed in the next denoiser call of a candidate."""
        return call.step < sampler.num_steps and self.parameters.active(sampler.timesteps[call.step])

    def asks(self, sampler: Sampler, calls: Sequence[Call]) -> list[Ask]:
        """What the references of candidates ask for that are not in their batch."""
        if self.parameters.repel:
            return []
        who = [(call.prompt, call.seed) for call in calls]
        for call in calls:
            if self._leader(call.prompt) == (call.prompt, call.seed) and call.ask is not None:
                self._asks[call.prompt, call.seed, call.step, call.passes] = call.ask
        absent = [leader for prompt in dict.fromkeys(p for p, _ in who) if (leader := self._leader(prompt)) not in who]
        self.extra_calls += len(absent) if calls[0].passes == 0 else 0
        return [self._ask_of(sampler, *leader, calls[0].step, calls[0].passes) for leader in absent]

    def answered(self, asks: Sequence[Ask], answers: Sequence[Any]) -> None:
        """What was answered to the references that ran along, so that those on their own way need not ask again."""
        for ask, answer in zip(asks, answers, strict=True):
            for shadow in self._shadows.values():
                if shadow.ask is ask:
                    shadow.count_pass()
                    shadow.answer(answer)

    def _leader(self, prompt: str) -> tuple[str, int]:
        return prompt, self.references[prompt]

    def _ask_of(self, sampler: Sampler, prompt: str, seed: int, step: int, number: int) -> Ask:
        """What a reference asks for in a step; it goes there on its own if it has not."""
        from ttsnap.pipelines.call import random_kept

        key = (prompt, seed, step, number)
        while key not in self._asks:
            shadow = self._shadows.get((prompt, seed))
            if shadow is None:
                shadow = self._shadows[prompt, seed] = sampler.begin(prompt, seed)
                shadow.progress.target = sampler.num_steps
            with random_kept(sampler.device):
                shadow.forward()
            if shadow.error is not None or shadow.ask is None:
                raise shadow.error or RuntimeError(
                    f"the reference of prompt {prompt!r} asked for nothing at step {step}"
                )
            if shadow.ask.model in sampler.probe.denoisers:
                self._asks[prompt, seed, shadow.step, shadow.passes] = shadow.ask
                if key in self._asks:
                    break
                self.extra_calls += shadow.passes == 0
                shadow.count_pass()
            shadow.answer(sampler.work(shadow.ask))
        return self._asks[key]

    @contextmanager
    def pushing(self, sampler: Sampler, calls: Sequence[Call]) -> Iterator[None]:
        """While the batch of these candidates (and of absent references behind them) runs, tokens are pushed."""
        who = [(call.prompt, call.seed) for call in calls]
        if self.parameters.repel:
            others = [
                [k for k, (p, s) in enumerate(who) if p == prompt and (p, s) != (prompt, seed)] for prompt, seed in who
            ]
            pairs = [(row, sources) for row, sources in enumerate(others) if sources]
        else:
            leaders = [self._leader(prompt) for prompt, _ in who]
            absent = [leader for leader in dict.fromkeys(leaders) if leader not in who]
            who = who + absent
            pairs = [(row, [who.index(lead)]) for row, lead in enumerate(leaders) if who[row] != lead]
        rows = [row for row, _ in pairs]
        pushed = Pushed(self.parameters, len(who), rows, [sources for _, sources in pairs])
        with pushed.hooked(sampler, self._drawn([who[row][1] for row in rows], calls[0].step)):
            yield

    def _drawn(self, seeds: list[int], index: int) -> list[torch.Generator]:
        """What decides which tokens are left alone in a call: of each candidate its own seed."""
        if self.parameters.merging_dropout == 0:
            return []
        return [torch.Generator("cpu").manual_seed(1000 * seed + index) for seed in seeds]


@dataclass
class Pushed:
    """Hooks that push tokens in one call.

    Attributes:
        parameters: how.
        count: candidates in the call; a batch of attention holds them once, or twice with guidance.
        rows: which of them are pushed.
        sources: whom each is pushed from.
    """

    parameters: Negtome
    count: int
    rows: list[int]
    sources: list[list[int]]

    @contextmanager
    def hooked(self, sampler: Sampler, generators: list[torch.Generator]) -> Iterator[None]:
        """The hooks are there for as long as the context is.

        Args:
            sampler: whose denoiser is hooked.
            generators: with dropout, one for each row; sites draw from them in turn.
        """
        handles = []
        try:
            for module, before, image in sites_of(sampler, self.parameters) if self.rows else []:
                kept = None
                if generators:
                    share = torch.stack([torch.rand(image, generator=generator) for generator in generators])
                    kept = share >= self.parameters.merging_dropout
                if before:
                    handles.append(module.register_forward_pre_hook(self._before(image, kept)))
                else:
                    handles.append(module.register_forward_hook(self._after(image, kept)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, image: int, kept: Tensor | None) -> Any:
        return lambda _, inputs: (self(inputs[0], image, kept), *inputs[1:])

    def _after(self, image: int, kept: Tensor | None) -> Any:
        return lambda _, inputs, output: self(output, image, kept)

    def __call__(self, tokens: Tensor, image: int, kept: Tensor | None) -> Tensor:
        """Tokens [n, t, d] of a batch, the last `image` of which are pushed where `kept` [rows, image] allows it."""
        tokens = tokens.clone()
        for first in range(0, len(tokens), self.count):  # each half of guidance by itself
            part = tokens[first : first + self.count, -image:]
            mask = None if kept is None else kept.to(tokens.device)
            if all(len(sources) == 1 for sources in self.sources):
                first_of = [sources[0] for sources in self.sources]
                part[self.rows] = push(part[self.rows], part[first_of], self.parameters, mask)
                continue
            before = part.clone()
            for number, (row, sources) in enumerate(zip(self.rows, self.sources, strict=True)):
                others = before[sources].flatten(0, 1)[None]
                own = None if mask is None else mask[number : number + 1]
                part[row : row + 1] = push(before[row : row + 1], others, self.parameters, own)
        return tokens


def attach(sampler: Sampler, parameters: Negtome | None) -> None:
    """Let a sampler work with negative token merging from now on, or (None) without.

    Raises:
        ValueError: not a model it works with.
    """
    if parameters is not None:
        name = type(sampler.pipe).__name__
        if name not in ALPHAS:
            raise ValueError(f"negtome works with {', '.join(ALPHAS)}, not with {name}")
        if parameters.merging_alpha is None:
            parameters = replace(parameters, merging_alpha=ALPHAS[name])
    sampler.diversity = None if parameters is None else Repulsion(parameters)


@contextmanager
def applied(sampler: Sampler, parameters: Negtome | None = None) -> Iterator[Repulsion]:
    """Within this context a sampler works with negative token merging (default: the authors' parameters)."""
    before = sampler.diversity
    attach(sampler, parameters or Negtome())
    assert isinstance(sampler.diversity, Repulsion)
    try:
        yield sampler.diversity
    finally:
        sampler.diversity = before


__all__ = ["REPEL", "Negtome", "Repulsion", "applied", "attach", "convert", "push"]
