"""Build the tokenizers of the embedded model and pretrain its CLIP and T5 text encoders on what prompts mean.

    python -m tools.shapes.text --out runs/text

Each token of a noun phrase must tell its thing's colour, shape and place (left, right, top, bottom, middle) through
T5; CLIP's pooled vector must tell what lies at each place. Trained through the denoiser alone, relations were never
learnt. Takes about two minutes; the encoders stay frozen afterwards.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from tools.shapes import common
from ttsnap.shapes.scenes import COLOURS, RELATIONS, SHAPES, Spec, sample_spec

CLIP_LENGTH, T5_LENGTH, WIDTH = 16, 12, 128
PLACES = ("left", "right", "top", "bottom", "middle")
WORDS = ("a", *COLOURS, *SHAPES, *dict.fromkeys(" ".join(RELATIONS).split()))
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizers(
    words: tuple[str, ...] = WORDS, clip_length: int = CLIP_LENGTH, t5_length: int = T5_LENGTH
) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Tokenizers that know the words of this world as one token each and spell all others."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=list(_LETTERS),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(words)] * 50 + [" ".join(_LETTERS)], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    clip = CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=clip_length)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words), ("▁", -5.0)]
    pieces += [(letter, -10.0) for letter in _LETTERS]
    return clip, T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=t5_length)


def encoders(clip: CLIPTokenizer, t5: T5TokenizerFast) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Two-layer text encoders of width 128."""
    clip_model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=WIDTH,
            max_position_embeddings=clip.model_max_length,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,  # pooling looks for it
            pad_token_id=clip.pad_token_id,
        )
    )
    t5_model = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=16,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=t5.pad_token_id,
            eos_token_id=t5.eos_token_id,
        )
    )
    return clip_model, t5_model


def token_ids(clip: CLIPTokenizer, t5: T5TokenizerFast, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Padded ids [n, CLIP's length] and [n, T5's length], as FluxPipeline makes them."""
    return tuple(
        tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        for tokenizer in (clip, t5)
    )


def places(spec: Spec) -> tuple[int, ...]:
    """Index in PLACES of each thing."""
    if not spec.relations:
        return (4,)
    return {"left of": (0, 1), "right of": (1, 0), "above": (2, 3), "below": (3, 2)}[spec.relations[0]]


def labels(specs: list[Spec]) -> tuple[Tensor, Tensor]:
    """Targets: colour, shape, place per T5 token [n, 12, 3], -100 outside nouns; and per place [n, 5, 2]."""
    tokens = torch.full((len(specs), T5_LENGTH, 3), -100)
    whole = torch.zeros(len(specs), 5, 2, dtype=torch.long)
    colours = tuple(COLOURS)
    for row, spec in enumerate(specs):
        start = 0
        for noun, place in zip(spec.things, places(spec), strict=True):
            target = torch.tensor([colours.index(noun.colour), SHAPES.index(noun.shape), place])
            tokens[row, start + 1 : start + 3] = target
            whole[row, place] = target[:2] + 1
            start += 3 + len(" ".join(spec.relations).split())
    return tokens, whole


class Heads(nn.Module):
    """Linear readings of the two encoders, needed in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.ModuleList(nn.Linear(WIDTH, n) for n in (6, 3, 5))
        self.pooled = nn.ModuleList(nn.Linear(WIDTH, 5 * n) for n in (7, 4))

    def forward(self, hidden: Tensor, pooled: Tensor, tokens: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and the share of exactly right prompts by T5 and by CLIP."""
        loss = hidden.new_zeros(())
        right_tokens = torch.ones(len(hidden), dtype=torch.bool)
        right_pooled = right_tokens.clone()
        for index, head in enumerate(self.token):
            logits, target = head(hidden), tokens[..., index]
            loss = loss + F.cross_entropy(logits.flatten(0, 1), target.flatten())
            right_tokens &= ((logits.argmax(-1) == target) | (target == -100)).all(1)
        for index, head in enumerate(self.pooled):
            logits, target = head(pooled).unflatten(1, (5, -1)), whole[..., index]
            loss = loss + F.cross_entropy(logits.flatten(0, 1), target.flatten())
            right_pooled &= (logits.argmax(-1) == target).all(1)
        return loss, right_tokens.float().mean(), right_pooled.float().mean()


def train(out: Path, steps: int) -> None:
    """The whole training; short enough to start over after a kill."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    log = common.Log(out)
    clip, t5 = tokenizers()
    clip_model, t5_model = encoders(clip, t5)
    heads = Heads()
    modules = (clip_model, t5_model, heads)
    optimiser = torch.optim.AdamW([p for m in modules for p in m.parameters()], lr=2e-3, betas=(0.9, 0.98))

    def forward(specs: list[Spec]) -> tuple[Tensor, Tensor, Tensor]:
        clip_ids, t5_ids = token_ids(clip, t5, [spec.prompt for spec in specs])
        hidden, pooled = t5_model(t5_ids).last_hidden_state, clip_model(clip_ids).pooler_output
        return heads(hidden, pooled, *labels(specs))

    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * common.schedule(step / steps)
        loss, by_t5, by_clip = forward([sample_spec(rng) for _ in range(128)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 99:
            with torch.no_grad():
                _, held_t5, held_clip = forward([sample_spec(rng, held_out=True) for _ in range(256)])
            log(step=step + 1, loss=loss.item(), t5=by_t5.item(), clip=by_clip.item(),
                held_out_t5=held_t5.item(), held_out_clip=held_clip.item())  # fmt: skip
    clip.save_pretrained(out / "tokenizer")
    t5.save_pretrained(out / "tokenizer_2")
    clip_model.save_pretrained(out / "text_encoder")
    t5_model.save_pretrained(out / "text_encoder_2")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    parser.add_argument("--steps", type=int, default=1500)
    a = parser.parse_args()
    train(a.out, a.steps)


if __name__ == "__main__":
    main()
