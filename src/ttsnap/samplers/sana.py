"""Sana: drives a stock `SanaPipeline`, one denoiser call at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttsnap.samplers.flow import FlowSteps
from ttsnap.samplers.pixart import MaskedText, PixArtSampler
from ttsnap.samplers.steps import Steps
from ttsnap.samplers.text import default_of, warn_if_chat_cut


class SanaSampler(PixArtSampler):
    """Drives `SanaPipeline` for any mix of candidates; see `PixArtSampler` for masks, sizes and options.

    Latents are kept in fp32. The pipeline's instruction (its default `complex_human_instruction`) stands before each
    prompt, not before the negative one.
    """

    least_unit = 32

    def make_steps(self, scheduler: Any) -> Steps:
        """Those of flow Euler, too."""
        if type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
            return FlowSteps(scheduler, self.num_steps, self.device)
        return super().make_steps(scheduler)

    def noise_dtype(self) -> torch.dtype:
        """In which dtype the pipeline draws noise and keeps latents."""
        return torch.float32

    def encode_text(self, prompt: str) -> MaskedText:
        """A prompt behind the instruction; of both, the last `max_sequence_length` tokens are read."""
        instruction = default_of(self.pipe, "complex_human_instruction")
        first = "\n".join(instruction or [])
        words = self.pipe.tokenizer
        whole = (len(words.encode(first)) - 2 if first else 0) + self.max_sequence_length - 1  # and a first token
        warn_if_chat_cut(words, lambda text: first + text, prompt.lower().strip(), whole, "Gemma")
        return self._encode(prompt, instruction)

    def encode_negative(self) -> MaskedText:
        """What guidance leads away from, without the instruction."""
        return self._encode(self.negative_prompt, None)

    def _encode(self, text: str, instruction: list[str] | None) -> MaskedText:
        states, mask, _, _ = self.pipe.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=instruction,
        )
        return MaskedText(states, mask)

    def predict(self, latents: Tensor, states: Tensor, mask: Tensor, time: Tensor) -> Tensor:
        """One pass of the transformer, in its dtype; the answer in fp32."""
        transformer = self.pipe.transformer
        answer: Tensor = transformer(
            latents.to(transformer.dtype),
            encoder_hidden_states=states.to(transformer.dtype),
            encoder_attention_mask=mask,
            timestep=time * transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return answer.float()
