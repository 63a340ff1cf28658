"""Requests of OpenAI's images API, and what they ask for."""

from __future__ import annotations

import io
import secrets
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from ttsnap.core.cost import Budget
from ttsnap.files.prompts import MAX_PROMPT, check_characters, tidied
from ttsnap.live.settings import read_size
from ttsnap.server.lanes import CallOptions, Edit
from ttsnap.server.settings import MOST_PICTURES, ServerSettings

MOST_SEED = 2**53 - 1  # which every JSON reader keeps
EFFORTS = {  # candidates, as a multiple of what the server starts with
    "low": 0.5,
    "medium": 1.0,
    "standard": 1.0,
    "auto": 1.0,
    "high": 2.0,
    "hd": 2.0,
    "xhigh": 4.0,
    "max": 8.0,
}


class Generation(BaseModel):
    """The body of `/v1/images/generations`, and the fields of the form of `/v1/images/edits`.

    The last ones are not OpenAI's; its client sends them as `extra_body`.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    model: str | None = None
    n: int = Field(1, ge=1, le=MOST_PICTURES)
    size: str = "auto"
    quality: str = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100)
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    background: Literal["auto", "opaque"] = "auto"
    moderation: str | None = None
    style: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    input_fidelity: str | None = None
    seed: int | None = Field(None, ge=0, le=MOST_SEED)
    steps: int | None = Field(None, ge=1, validation_alias=AliasChoices("steps", "num_inference_steps"))
    guidance: float | None = Field(
        None, allow_inf_nan=False, validation_alias=AliasChoices("guidance", "guidance_scale")
    )
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    strength: float | None = Field(None, gt=0, le=1)

    def text(self) -> str:
        """The prompt, tidied.

        Raises:
            ValueError: it is empty, or has control characters.
        """
        return tidied(self.prompt)

    def effort(self) -> float | Budget:
        """How much is searched.

        Raises:
            ValueError: quality is no level and no budget.
        """
        if self.quality in EFFORTS:
            return EFFORTS[self.quality]
        try:
            return Budget.parse(self.quality)
        except ValueError:
            levels = ", ".join(EFFORTS)
            raise ValueError(
                f"quality: it is {levels}, or a budget such as 200NFE, 2000TFLOP or 30s, got {self.quality[:40]!r}"
            ) from None

    def first_seed(self) -> int:
        """The seed that was asked for, else one that nobody knows before."""
        return self.seed if self.seed is not None else secrets.randbelow(2**31)

    def options(self, limits: ServerSettings, edit: Edit | None = None) -> CallOptions:
        """Arguments of the pipeline's call.

        Raises:
            ValueError: one that the server does not take.
        """
        size = None if self.size == "auto" else self.size.lower()
        if size is not None:
            try:
                largest = max(read_size(size).values())
            except ValueError:
                largest = limits.max_size + 1
            if "x" not in size or largest > limits.max_size:
                most = f"at most {limits.max_size} pixels a side"
                raise ValueError(f"size: it is auto or such as 512x512, {most}, got {self.size[:40]!r}")
        if self.steps is not None and self.steps > limits.max_steps:
            raise ValueError(f"steps: at most {limits.max_steps}, got {self.steps}")
        if self.strength is not None and edit is None:
            raise ValueError("strength: it belongs to /v1/images/edits, which has a picture to start from")
        check_characters(self.negative_prompt or "", "the negative prompt")
        return CallOptions(size, self.steps, self.guidance, self.negative_prompt or None, edit)


def edit_of(image: bytes, mask: bytes | None, strength: float | None) -> Edit:
    """A picture to start from; where the mask is transparent, as in OpenAI's API, it is painted over.

    Raises:
        ValueError: one of them is no picture, or their sizes differ.
    """
    from PIL import Image

    whole = _opened(image, "image")
    if mask is None:
        return Edit(image, None, strength)
    other = _opened(mask, "mask")
    if other.size != whole.size:
        raise ValueError(f"mask: it has {other.size} pixels where the image has {whole.size}; both need the same size")
    if other.mode not in ("RGBA", "LA", "PA") and "transparency" not in other.info:
        raise ValueError("mask: it has no transparent pixels; they say where the image is painted over")
    alpha = other.convert("RGBA").getchannel("A")
    white = io.BytesIO()
    Image.eval(alpha, lambda value: 255 if value < 128 else 0).save(white, format="PNG")
    return Edit(image, white.getvalue(), strength)


def _opened(data: bytes, name: str) -> Any:
    from PIL import Image

    from ttsnap.files.pictures import LONGEST_SIDE, MOST_PIXELS

    try:
        picture = Image.open(io.BytesIO(data))
        if picture.width * picture.height > MOST_PIXELS or max(picture.size) > LONGEST_SIDE:
            raise ValueError(f"{name}: it has {picture.width} x {picture.height} pixels; at most 64 million are taken")
        picture.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: it is not a picture that can be read") from error
    return picture
