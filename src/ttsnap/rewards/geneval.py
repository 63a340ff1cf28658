"""GenEval's check (Ghosh et al., 2023) by an open detector: are objects, counts, colours and positions right?

    reward = share of what the prompt asks for that is in the picture; 1 where GenEval calls it correct

A detector finds the objects, zero-shot CLIP names the colour of each. The rules are the published ones (`Rules`):

    found       sure enough, at most 16 of a class, none that overlaps a surer one too much; the surest ones count
    colour      of the box, the likeliest of ten by CLIP ViT-L/14 with three wordings
    position    of the boxes' centres, less a tenth of both boxes' sides; the direction is told by the larger part
    counting    so many, and not one more

The published detector is a Mask2Former trained on COCO's classes. Here it is OWLv2 or Grounding DINO, which find what
they are told the name of, each class on its own; they are less sure than it is, and name a thing twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttsnap.rewards import preprocess
from ttsnap.rewards.clip import ClipReward, check_counts, load_clipscore
from ttsnap.rewards.geneval_prompts import COLOURS, Scene, read
from ttsnap.rewards.sources import GENEVAL, model_folder

KINDS = ("owlv2", "grounding-dino")
BATCH = 8  # pictures that are shown to the detector at once
WORDINGS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Rules:
    """When an object is found, and when it is left of, right of, above or below another.

    Attributes:
        confidence: of a box, more than this.
        counting: the same where things are counted.
        most: boxes of a class, the surest ones.
        overlap: intersection over union with a surer box of its class, less than this (1: any).
        margin: share of both boxes' sides that is taken off the distance of their centres.
    """

    confidence: float = 0.3
    counting: float = 0.3
    most: int = 16
    overlap: float = 0.5
    margin: float = 0.1


PUBLISHED = Rules(counting=0.9, overlap=1.0)  # for Mask2Former

Boxes = list[tuple[float, float, float, float]]  # left, top, right, bottom in pixels, the surest first


class Detector(nn.Module):
    """OWLv2 or Grounding DINO of transformers: boxes of a class in pictures."""

    model: Any

    def __init__(self, model: Any, tokenizer: Any, size: tuple[int, int]) -> None:
        """Put the parts together.

        Args:
            model: `Owlv2ForObjectDetection` or `GroundingDinoForObjectDetection`.
            tokenizer: the model's.
            size: OWLv2: height and width of what it sees; Grounding DINO: the shortest side, and the longest at most.
        """
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.size = tokenizer, size
        self.squares = model.config.model_type == "owlv2"
        self.eval()

    def forward(self, images: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Confidences [n, boxes] and boxes [n, boxes, 4] in pixels of one class in each of images [n, 3, h, w]."""
        height, width = images.shape[-2:]
        given = {key: value.to(images.device) for key, value in self._words(names).items()}
        output = self.model(pixel_values=self.see(images).to(self.model.dtype), **given)
        sides = [max(height, width)] * 2 if self.squares else [width, height]
        centre, size = output.pred_boxes.float().chunk(2, dim=-1)
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
        return output.logits.float().sigmoid().amax(-1), boxes * boxes.new_tensor(sides * 2)

    def see(self, images: Tensor) -> Tensor:
        """What the network sees of images [n, 3, h, w] in 0..1."""
        images = preprocess.eight_bits(images)
        height, width = images.shape[-2:]
        if self.squares:  # what is added to make a square is black, on the right and below
            side = max(height, width)
            images = F.pad(images, (0, side - width, 0, side - height))
            seen = F.interpolate(images, self.size, mode="bilinear", antialias=True)
            return preprocess.normalise(seen)
        scale = min(self.size[0] / min(height, width), self.size[1] / max(height, width))
        sides = [max(1, round(side * scale)) for side in (height, width)]
        return preprocess.normalise(F.interpolate(images, sides, mode="bilinear", antialias=True), *IMAGENET)

    def _words(self, names: Sequence[str]) -> dict[str, Tensor]:
        if self.squares:
            texts = [f"a photo of a {name}" for name in names]
            length = int(self.model.config.text_config.max_position_embeddings)
            read = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            return {key: read[key] for key in ("input_ids", "attention_mask")}
        read = self.tokenizer([f"{name}." for name in names], padding=True, return_tensors="pt")
        return dict(read)


class GenEval(nn.Module):
    """Judges pictures of GenEval's prompts, and of any other of its grammar.

    Attributes:
        perfect: the reward of a picture that is right in all; `ttsnap bench` tells the share of these.
        example: a prompt that it can be asked about.
    """

    perfect = 1.0
    example = "a photo of a red cup and a green dog"

    def __init__(self, detector: Detector, clip: ClipReward, rules: Rules = Rules()) -> None:
        super().__init__()
        self.detector, self.clip, self.rules = detector, clip, rules
        self._classifiers: dict[str, Tensor] = {}
        self.eval()

    def forward(self, images: Tensor, prompts: Sequence[str], *, sigma: float = 0.0) -> Tensor:
        """Rewards [n] in 0..1 of images [n, 3, h, w] in 0..1; takes no notice of `sigma`.

        Raises:
            ValueError: a prompt is not of GenEval's grammar.
        """
        check_counts(images, prompts)
        scenes = [read(prompt) for prompt in prompts]
        images = images.to(self.clip.clip.logit_scale.device)
        rows = [(row, name) for row, scene in enumerate(scenes) for name in {t.name: None for t in scene.things}]
        found: list[dict[str, Boxes]] = [{} for _ in scenes]
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            confidences, boxes = self.detector(images[[row for row, _ in some]], [name for _, name in some])
            for (row, name), sure, where in zip(some, confidences, boxes, strict=True):
                counted = scenes[row].kind == "counting"
                least = self.rules.counting if counted else self.rules.confidence
                found[row][name] = kept(sure, where, least, self.rules)
        judged = zip(scenes, found, images, strict=True)
        return images.new_tensor([self.judge(scene, boxes, image) for scene, boxes, image in judged])

    def judge(self, scene: Scene, found: dict[str, Boxes], image: Tensor) -> float:
        """Share of what a scene asks for that is there.

        Args:
            scene: what must be in the picture.
            found: boxes of each of its classes.
            image: [3, h, w] in 0..1, of which the boxes' colours are judged.
        """
        met: list[bool] = []
        first: Boxes | None = None  # of the first thing, if all is right with it
        for number, thing in enumerate(scene.things):
            boxes = found.get(thing.name, [])[: thing.count]
            right = len(boxes) == thing.count
            met.append(right)
            if thing.colour is not None:
                right = right and all(colour == thing.colour for colour in self.colours(image, boxes, thing.name))
                met.append(right)
            if thing.relation is not None:
                right = (
                    right
                    and first is not None
                    and all(
                        thing.relation in relations(one, other, self.rules.margin) for one in boxes for other in first
                    )
                )
                met.append(right)
            if number == 0:
                first = boxes if right else None
        if scene.kind == "counting":
            met.append(len(found.get(scene.things[0].name, [])) == scene.things[0].count)
        return sum(met) / len(met)

    def colours(self, image: Tensor, boxes: Boxes, name: str) -> list[str]:
        """The likeliest colour of what is in each box of an image [3, h, w]."""
        if not boxes:
            return []
        pixels = torch.cat([self.clip.fit(crop(image, box)[None]) for box in boxes])
        features = self.clip.clip.get_image_features(pixel_values=pixels).pooler_output.float()
        best = (F.normalize(features, dim=-1) @ self._classifier(name).T).argmax(-1)
        return [COLOURS[place] for place in best.tolist()]

    def _classifier(self, name: str) -> Tensor:
        """Text features [colours, d] of things of a class: means over wordings, of length 1."""
        if name not in self._classifiers:
            device = self.clip.clip.logit_scale.device
            texts = [[wording.format(colour, name) for wording in WORDINGS] for colour in COLOURS]
            means = [torch.cat([self.clip.read(text, device) for text in some]).mean(0) for some in texts]
            self._classifiers[name] = F.normalize(torch.stack(means), dim=-1)
        return self._classifiers[name]


def kept(confidences: Tensor, boxes: Tensor, least: float, rules: Rules) -> Boxes:
    """The boxes that count, the surest first.

    Args:
        confidences: [boxes].
        boxes: [boxes, 4]: left, top, right, bottom.
        least: they must be surer than this.
        rules: how many, and how far they may overlap.
    """
    order = confidences.argsort(descending=True, stable=True)[: rules.most]
    sure = order[confidences[order] > least]
    found: Boxes = []
    for box in boxes[sure].tolist():
        if rules.overlap >= 1 or all(overlap(box, other) < rules.overlap for other in found):
            found.append(tuple(box))
    return found


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes, of whose pixels the last ones count as well."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    shared = area(max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))
    return shared / (area(*one) + area(*other) - shared)


def relations(one: Sequence[float], other: Sequence[float], margin: float) -> set[str]:
    """Where a box is, seen from another; nothing where it is too near to tell."""
    apart, rest = [], []
    for axis in (0, 1):
        distance = (one[axis] + one[axis + 2] - other[axis] - other[axis + 2]) / 2
        sides = abs(one[axis + 2] - one[axis]) + abs(other[axis + 2] - other[axis])
        apart.append(distance)
        rest.append(math.copysign(max(abs(distance) - margin * sides, 0.0), distance))
    if all(abs(value) < 1e-3 for value in rest):
        return set()
    across, down = (value / math.hypot(*apart) for value in rest)
    told = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, true in told.items() if true}


def crop(image: Tensor, box: Sequence[float]) -> Tensor:
    """What is in a box of an image [3, h, w], at least a pixel."""
    height, width = image.shape[-2:]
    left, top = (min(max(round(value), 0), side - 1) for value, side in zip(box[:2], (width, height), strict=True))
    right, bottom = max(round(box[2]), left + 1), max(round(box[3]), top + 1)
    return image[:, top:bottom, left:right]


def load_geneval(device: Any = "cpu", path: str | None = None, rules: Rules = Rules()) -> GenEval:
    """GenEval's check.

    Args:
        device: where both networks run.
        path: directory or hub repository of the detector, OWLv2 or Grounding DINO (default: OWLv2, the large one);
            CLIP's weights may lie in its folder `clip`, and are the hub's if not.
        rules: of the check.

    Raises:
        ValueError: something is not there, or not what it should be.
    """
    folder = model_folder("geneval", path or GENEVAL.repo)
    detector = load_detector(folder).to(device)
    beside = folder / "clip"
    return GenEval(detector, load_clipscore(device, str(beside) if beside.is_dir() else None), rules).to(device)


def load_detector(folder: Path) -> Detector:
    """A detector from the directory of its published files.

    Raises:
        ValueError: it is another model, or its weights do not fit.
    """
    from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer

    from ttsnap.rewards.vision_language import load_whole

    model = load_whole(AutoModelForZeroShotObjectDetection, "geneval", folder, KINDS)
    file = folder / "preprocessor_config.json"
    size = json.loads(file.read_text(encoding="utf-8")).get("size") if file.is_file() else None
    if model.config.model_type == "owlv2":
        side = int(model.config.vision_config.image_size)
        sides = (int(size["height"]), int(size["width"])) if isinstance(size, dict) else (side, side)
    else:
        size = size if isinstance(size, dict) else {}
        sides = int(size.get("shortest_edge", 800)), int(size.get("longest_edge", 1333))
    return Detector(model, AutoTokenizer.from_pretrained(folder), sides)
