"""Negative token merging (Singh et al. 2024, arXiv 2412.01339): candidates move away from the first of their prompt.

While the noise is high, each image token after an attention is pushed away from its best match among the tokens that
the reference, the first candidate of the same prompt, has there. The reference itself is left as it is, to the last
bit. Only the prompt, the seed and the reference's seed decide an image, not the others in the batch: where the
reference is not in a batch (split off, or pruned), it runs along in it, which costs calls that `extra_calls` counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from ttsnap.samplers.base import BaseSampler, PipelineSampler


@dataclass(frozen=True)
class Negtome:
    """The published parameters; the defaults are the authors' for FLUX.

    Attributes:
        merging_alpha: how far a token is pushed; 0 changes nothing.
        merging_threshold: least cosine similarity to the best match for a token to be pushed.
        merging_dropout: share of tokens left alone, drawn from the candidate's seed.
        t_start: highest timestep (0..1000) at which tokens are pushed.
        t_end: lowest.
        num_joint_blocks: the first so many joint blocks take part; -1: all.
        num_single_blocks: the same for single blocks.
        repel: push every token from its best match, however little alike they are.
    """

    merging_alpha: float = 0.9
    merging_threshold: float = 0.65
    merging_dropout: float = 0.0
    t_start: float = 1000.0
    t_end: float = 900.0
    num_joint_blocks: int = -1
    num_single_blocks: int = -1
    repel: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.merging_alpha):
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

    def active(self, timestep: float) -> bool:
        """Whether tokens are pushed at a timestep (0..1000)."""
        return self.merging_alpha != 0 and self.t_end <= round(timestep, 3) <= self.t_start

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object, from which it can be made again."""
        return {"name": "negtome", **asdict(self)}


REPEL = Negtome(merging_alpha=3.0, merging_threshold=0.7, merging_dropout=0.2, repel=True)


def convert(text: str) -> dict[str, Any]:
    """Parameters of `merging_alpha=1.2,t_end=800`.

    Raises:
        ValueError: not of that form, or no such parameter.
    """
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(Negtome)}
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in kinds:
            raise ValueError(f"negtome has no parameter {name!r}; it has {', '.join(kinds)}")
        try:
            found[name] = {"true": True, "false": False}[value.lower()] if kinds[name] is bool else kinds[name](value)
        except (KeyError, ValueError):
            example = {bool: "true", int: "-1"}.get(kinds[name], "0.5")
            raise ValueError(f"{name} takes a value such as {name}={example}, got {value!r}") from None
    return found


def push(tokens: Tensor, reference: Tensor, parameters: Negtome, kept: Tensor | None = None) -> Tensor:
    """(1 + alpha) x - alpha m where the cosine similarity of x to its best match m exceeds the threshold, else x.

    Args:
        tokens: x [n, t, d].
        reference: tokens to be pushed from [n, t', d].
        parameters: alpha, threshold, repel.
        kept: which tokens may be pushed [n, t] (default: all).

    Returns:
        Tokens [n, t, d] in the dtype of `tokens`.
    """
    alpha = parameters.merging_alpha
    similarity = F.normalize(tokens.float(), dim=-1) @ F.normalize(reference.float(), dim=-1).transpose(1, 2)
    best, index = similarity.max(dim=-1)
    match = reference.gather(1, index[..., None].expand(-1, -1, reference.shape[-1]))
    pushed = torch.ones_like(best, dtype=torch.bool) if parameters.repel else best > parameters.merging_threshold
    if kept is not None:
        pushed = pushed & kept
    return torch.where(pushed[..., None], (1 + alpha) * tokens - alpha * match, tokens)


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
    _path: dict[tuple[str, int, int], Tensor] = field(default_factory=dict, repr=False)

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
        self._path.clear()

    def call(
        self,
        sampler: BaseSampler,
        latents: Tensor,
        encoded: list[Any],
        index: int,
        prompts: Sequence[str],
        seeds: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """`sampler.call` for candidates with these prompts and seeds [n], pushed where the parameters say so."""
        if not self.parameters.active(sampler.timesteps[index]):
            return sampler.call(latents, encoded, index)
        who = list(zip(prompts, seeds, strict=True))
        leaders = {prompt: (prompt, self.references[prompt]) for prompt in dict.fromkeys(prompts)}
        absent = [leader for leader in leaders.values() if leader not in who]
        if absent:
            latents = torch.cat([latents, *(self._latents(sampler, *leader, index) for leader in absent)])
            encoded = [*encoded, *(sampler.text(prompt) for prompt, _ in absent)]
            self.extra_calls += len(absent)
        everybody = who + absent
        source = [everybody.index(leaders[prompt]) for prompt, _ in everybody]
        rows = [row for row, leader in enumerate(source) if everybody[row] != everybody[leader]]
        with self._hooks(sampler, latents, rows, [source[row] for row in rows], [who[row][1] for row in rows], index):
            following, x0 = sampler.call(latents, encoded, index)
        for leader in leaders.values():
            row = everybody.index(leader)
            self._path[*leader, index + 1] = following[row : row + 1].clone()
        return following[: len(who)], x0[: len(who)]

    def _latents(self, sampler: BaseSampler, prompt: str, seed: int, index: int) -> Tensor:
        """Latents [1, ...] of a reference before a call."""
        if index == 0:
            return sampler.noise(seed)
        key = (prompt, seed, index)
        if key not in self._path:
            before = self._latents(sampler, prompt, seed, index - 1)
            self._path[key] = sampler.call(before, [sampler.text(prompt)], index - 1)[0]
            self.extra_calls += 1
        return self._path[key]

    @contextmanager
    def _hooks(
        self,
        sampler: BaseSampler,
        latents: Tensor,
        rows: list[int],
        sources: list[int],
        seeds: list[int],
        index: int,
    ) -> Iterator[None]:
        """Hooks on the attention of the transformer that push `rows`; they are there for one call only."""
        if not rows:
            yield
            return
        parameters, tokens = self.parameters, latents.shape[1]
        transformer = sampler.pipe.transformer
        joint = _first(transformer.transformer_blocks, parameters.num_joint_blocks)
        single = _first(transformer.single_transformer_blocks, parameters.num_single_blocks)
        kept = self._kept(seeds, index, len(joint) + len(single), tokens)

        def pushed(image: Tensor, block: int) -> Tensor:
            mask = None if kept is None else kept[:, block].to(image.device)
            image = image.clone()
            image[rows] = push(image[rows], image[sources], parameters, mask)
            return image

        def before_projection(block: int) -> Any:
            return lambda _, inputs: (pushed(inputs[0], block), *inputs[1:])

        def after_attention(block: int) -> Any:  # text tokens come first
            return lambda _, inputs, output: torch.cat([output[:, :-tokens], pushed(output[:, -tokens:], block)], dim=1)

        handles = []
        try:
            for number, block in enumerate(joint):
                handles.append(block.attn.to_out[0].register_forward_pre_hook(before_projection(number)))
            for number, block in enumerate(single, len(joint)):
                handles.append(block.attn.register_forward_hook(after_attention(number)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _kept(self, seeds: list[int], index: int, blocks: int, tokens: int) -> Tensor | None:
        """Which tokens may be pushed [n, blocks, tokens]: of each candidate as its own seed says."""
        if self.parameters.merging_dropout == 0:
            return None
        drawn = [
            torch.rand(blocks, tokens, generator=torch.Generator("cpu").manual_seed(1000 * seed + index))
            for seed in seeds
        ]
        return torch.stack(drawn) >= self.parameters.merging_dropout


def _first(blocks: Any, count: int) -> list[Any]:
    return list(blocks if count < 0 else blocks[:count])


def attach(sampler: PipelineSampler, parameters: Negtome | None) -> None:
    """Let a sampler work with negative token merging from now on, or (None) without.

    Raises:
        ValueError: the model is not FLUX.
    """
    name = type(sampler.pipe).__name__
    if parameters is not None and (name != "FluxPipeline" or not hasattr(sampler, "call")):
        how = "" if name != "FluxPipeline" else " with its own call (the fallback sampler)"
        raise ValueError(f"negtome works with FluxPipeline, not with {name}{how}")
    sampler.diversity = None if parameters is None else Repulsion(parameters)


@contextmanager
def applied(sampler: BaseSampler, parameters: Negtome | None = None) -> Iterator[Repulsion]:
    """Within this context a sampler works with negative token merging (default: the authors' parameters)."""
    before = sampler.diversity
    attach(sampler, parameters or Negtome())
    assert sampler.diversity is not None
    try:
        yield sampler.diversity
    finally:
        sampler.diversity = before


__all__ = ["REPEL", "Negtome", "Repulsion", "applied", "attach", "convert", "push"]
