"""GenEval: its list, its rules on boxes given by hand, and small random detectors of the real classes."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from tests.rewards import reference as ref
from ttsnap import rewards
from ttsnap.pipelines import flops
from ttsnap.rewards import clip, geneval, preprocess
from ttsnap.rewards.geneval import PUBLISHED, Rules, kept, overlap, relations
from ttsnap.rewards.geneval_prompts import CLASSES, KINDS, Scene, Thing, prompts, read, scenes

PUBLISHED_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # of evaluation_metadata.jsonl
TAGS = dict(zip(KINDS, ("single_object", "two_object", "counting", "colors", "position", "color_attr"), strict=True))


def published_line(scene):
    """A scene as a line of the published file."""
    include = []
    for thing in scene.things:
        said = {"class": thing.name, "count": thing.count}
        said |= {"color": thing.colour} if thing.colour else {}
        include.append(said | ({"position": [thing.relation, 0]} if thing.relation else {}))
    line = {"tag": TAGS[scene.kind], "include": include}
    if scene.kind == "counting":
        line["exclude"] = [{"class": scene.things[0].name, "count": scene.things[0].count + 1}]
    return json.dumps(line | {"prompt": scene.prompt})


def test_the_list_is_the_published_one_to_the_byte():
    text = "".join(published_line(scene) + "\n" for scene in scenes())
    assert hashlib.sha256(text.encode()).hexdigest() == PUBLISHED_SHA256
    counts = {kind: sum(scene.kind == kind for scene in scenes()) for kind in KINDS}
    assert list(counts.values()) == [80, 99, 80, 94, 100, 100]
    assert len(set(scenes(1)) & set(scenes())) < len(scenes()) / 2


def test_a_prompt_says_what_must_be_in_the_picture():
    for seed in (43, 44):
        assert [read(scene.prompt) for scene in scenes(seed)] == list(scenes(seed))
    assert read("A photo of  an orange orange.") == Scene("colours", (Thing("orange", colour="orange"),))
    assert read("a photo of a red cup left of a dog").things == (
        Thing("dog"),
        Thing("cup", colour="red", relation="left of"),
    )
    for text in ("a photo of a unicorn", "a dog", "a photo of five dogs", "a photo of a dog and a cat and a cow"):
        with pytest.raises(ValueError, match="such as `a photo of two dogs`"):
            read(text)


def test_the_command_line_knows_the_list(ttsnap):
    from ttsnap.cli.options import read_prompts

    assert read_prompts((), "geneval") == prompts()
    code, _, err = ttsnap("bench", "--prompts", "genival")
    assert code == 2
    assert "unknown prompts 'genival'; known are geneval, " in err


DOG, CAT = (10.0, 40.0, 30.0, 60.0), (60.0, 40.0, 90.0, 70.0)


class Coloured(nn.Module):
    """In CLIP's place: boxes are as red or green as their pixels."""

    def __init__(self):
        super().__init__()
        self.clip = nn.Module()
        self.clip.logit_scale = nn.Parameter(torch.zeros(()))


@pytest.fixture
def judge():
    image = torch.zeros(3, 100, 100)
    image[0, 40:60, 10:30] = 1  # the dog is red, the cat is green
    image[1, 40:70, 60:90] = 1
    reward = geneval.GenEval(nn.Module(), Coloured())

    def colours(image, boxes, name):
        return [("red", "green")[int(geneval.crop(image, box).mean((1, 2)).argmax())] for box in boxes]

    reward.colours = colours
    return lambda prompt, **found: reward.judge(read(f"a photo of {prompt}"), found, image)


def test_objects_and_counts(judge):
    assert judge("a dog", dog=[DOG]) == 1
    assert judge("a dog", dog=[DOG, CAT]) == 1  # more than one is no fault
    assert judge("a dog", cat=[CAT]) == 0
    assert judge("a dog and a cat", dog=[DOG], cat=[CAT]) == 1
    assert judge("a dog and a cat", dog=[DOG]) == 0.5
    assert judge("two dogs", dog=[DOG, CAT]) == 1
    assert judge("two dogs", dog=[DOG]) == 0
    assert judge("two dogs", dog=[DOG, CAT, CAT]) == 0.5  # where things are counted it is one


def test_colours_are_those_of_the_surest_boxes(judge):
    assert judge("a red dog", dog=[DOG]) == 1
    assert judge("a green dog", dog=[DOG]) == 0.5
    assert judge("a green dog", dog=[DOG, CAT]) == 0.5  # the green one is the second
    assert judge("a red dog", dog=[]) == 0
    assert judge("a red dog and a green cat", dog=[DOG], cat=[CAT]) == 1
    assert judge("a green dog and a red cat", dog=[DOG], cat=[CAT]) == 0.5
    assert judge("a red dog and a green cat", dog=[DOG]) == 0.5


def test_positions(judge):
    assert judge("a dog left of a cat", dog=[DOG], cat=[CAT]) == 1
    assert judge("a cat right of a dog", dog=[DOG], cat=[CAT]) == 1
    assert judge("a dog right of a cat", dog=[DOG], cat=[CAT]) == pytest.approx(2 / 3)
    assert judge("a dog above a cat", dog=[DOG], cat=[CAT]) == pytest.approx(2 / 3)
    assert judge("a dog left of a cat", dog=[DOG]) == pytest.approx(1 / 3)  # nothing to be left of
    assert judge("a dog left of a red cat", dog=[DOG], cat=[CAT]) == 0.5  # nor of a cat of another colour


def test_where_a_box_is_seen_from_another():
    box = (40, 40, 60, 60)
    assert relations((0, 40, 20, 60), box, 0.1) == {"left of"}
    assert relations((0, 0, 20, 20), box, 0.1) == {"left of", "above"}
    assert relations((40, 70, 60, 90), box, 0.1) == {"below"}
    assert relations((80, 30, 100, 50), box, 0.1) == {"right of"}
    assert relations((43, 40, 63, 60), box, 0.1) == set()  # within a tenth of both sides
    assert relations((45, 40, 65, 60), box, 0.1) == set()  # beyond, but less than half of the way is
    assert relations((49, 40, 69, 60), box, 0.1) == {"right of"}
    assert relations((43, 40, 63, 60), box, 0) == {"right of"}
    assert relations(box, box, 0) == set()


def test_which_boxes_count():
    boxes = torch.tensor([[0, 0, 9, 9], [0, 0, 9, 4], [50, 50, 59, 59], [20, 20, 29, 29]], dtype=torch.float)
    sure = torch.tensor([0.6, 0.95, 0.31, 0.3])
    assert overlap(boxes[0].tolist(), boxes[1].tolist()) == 0.5
    assert overlap(boxes[0].tolist(), boxes[2].tolist()) == 0
    as_tuples = [tuple(box) for box in boxes.tolist()]
    assert kept(sure, boxes, 0.3, Rules(overlap=0.51)) == [as_tuples[1], as_tuples[0], as_tuples[2]]
    assert kept(sure, boxes, 0.3, Rules(overlap=0.5)) == [as_tuples[1], as_tuples[2]]
    assert kept(sure, boxes, 0.9, PUBLISHED) == [as_tuples[1]]
    assert len(kept(torch.linspace(0.4, 0.9, 40), torch.zeros(40, 4), 0.3, PUBLISHED)) == 16


def test_a_crop_has_a_pixel_at_least_and_stays_in_the_image():
    image = torch.rand(3, 10, 20)
    assert torch.equal(geneval.crop(image, (3.4, 1.6, 7.2, 5.0)), image[:, 2:5, 3:7])
    assert torch.equal(geneval.crop(image, (-4, -4, 300, 300)), image)
    assert geneval.crop(image, (25, 12, 25, 12)).shape == (3, 1, 1)


# Detectors of the real classes.

WORDS = sorted({word for name in CLASSES for word in name.split()})
VOCABULARY = {word: n for n, word in enumerate(["[PAD]", "[UNK]", ".", *WORDS, "[CLS]", "[SEP]"])}


def save_tokenizer(folder):
    """A token for each word of the classes. OWLv2 takes a first token of 0 for no query, the largest for the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, VOCABULARY[token]) for token in ("[CLS]", "[SEP]")]
    plain.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def save_owlv2(folder):
    """A small OWLv2 as it is published, CLIP beside it."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = text | {"image_size": 64, "patch_size": 16}
    text |= {"vocab_size": len(VOCABULARY), "max_position_embeddings": 16}
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=32))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 64, "width": 64}}))


def save_dino(folder):
    """A small Grounding DINO as it is published."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    save_tokenizer(folder)
    swin = {"model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1],
            "num_heads": [1, 2, 4], "window_size": 4, "out_features": ["stage1", "stage2", "stage3"]}  # fmt: skip
    text = {"model_type": "bert", "vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 32}  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=swin, text_config=text, d_model=32, num_queries=12, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 48, "longest_edge": 80}}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Both detectors in folders, CLIP in each."""
    found = {"owlv2": save_owlv2, "grounding-dino": save_dino}
    state = ref.open_clip_state(len(ref.clip_tokenizer()))
    torch.manual_seed(0)
    for name, save in found.items():
        found[name] = tmp_path_factory.mktemp(name)
        save(found[name])
        (found[name] / "clip").mkdir()
        ref.save_clip(found[name] / "clip", "model.safetensors", ref.to_transformers(state), act="quick_gelu")
    return found


IMAGES = (torch.rand(3, 3, 48, 72, generator=ref.generator(3)) * 255).round() / 255
SOME = ["a photo of a red cup and a green dog", "a photo of two traffic lights", "a photo of a dog left of a cat"]


@pytest.mark.parametrize("kind", geneval.KINDS)
def test_a_published_directory_loads_strictly_and_a_batch_changes_nothing(saved, kind, tmp_path, monkeypatch):
    (reward,) = rewards.load(f"geneval={saved[kind]}").values()
    with torch.no_grad():
        reward.rules = Rules(0.0, 0.0, overlap=1)  # random weights are not sure of anything
        told = reward(IMAGES, SOME)
        alone = torch.cat([reward(IMAGES[n : n + 1], SOME[n : n + 1]) for n in range(3)])
        together = reward.detector(IMAGES, ["dog", "traffic light", "cup"])
        for n, name in enumerate(("dog", "traffic light", "cup")):
            for all_rows, one in zip(together, reward.detector(IMAGES[n : n + 1], [name]), strict=True):
                torch.testing.assert_close(all_rows[n], one[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(told, alone)
    assert told[1] == 0.5  # two, and more than two
    assert ((told >= 0.5) & (told <= 1)).all()
    confidences, boxes = together
    assert confidences.shape == boxes.shape[:2]
    assert confidences.std() / confidences.mean() > 1e-4
    look = flops.count_look(reward, "cpu", 48, 72).look
    one = flops.count_tflop(lambda: reward.detector(IMAGES[:1], ["cup"]))
    assert look >= 1.9 * one  # two classes are looked for
    weights = saved[kind] / "model.safetensors"
    state = load_file(weights)
    for file in saved[kind].iterdir():
        if file.is_file() and file != weights:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(dict(list(state.items())[1:]), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"geneval: .* is no whole {kind}: the model lacks"):
        geneval.load_detector(tmp_path)


def test_pictures_are_cut_as_the_library_cuts_them_and_boxes_are_where_it_says(saved):
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
    from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil

    smooth = F.interpolate(torch.rand(1, 3, 6, 9, generator=ref.generator(4)), (96, 144), mode="bicubic").clamp(0, 1)
    picture = Image.fromarray((smooth[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())
    processors = {
        "owlv2": Owlv2ImageProcessorPil(size={"height": 64, "width": 64}),
        "grounding-dino": GroundingDinoImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 80}),
    }
    for kind, processor in processors.items():
        detector = geneval.load_detector(saved[kind])
        wanted = torch.as_tensor(np.asarray(processor(images=[picture], return_tensors="np")["pixel_values"][0]))
        found = detector.see(smooth)[0]
        assert found.shape == wanted.shape
        assert (found - wanted).abs().mean() < 0.03
        if kind == "owlv2":
            with torch.no_grad():
                words = detector._words(["dog"])
                output = detector.model(pixel_values=detector.see(smooth), **words)
                assert output.logits.abs().max() < 1e3  # none of the queries is taken for padding
                (theirs,) = processor.post_process_object_detection(output, -1.0, [(96, 144)])
                confidences, boxes = detector(smooth, ["dog"])
            torch.testing.assert_close(boxes[0], theirs["boxes"])
            torch.testing.assert_close(confidences[0], theirs["scores"])


def test_the_colour_is_the_likeliest_of_the_mean_over_wordings(saved):
    reward = geneval.load_geneval("cpu", str(saved["owlv2"]))
    box = (8.0, 4.0, 40.0, 30.0)
    with torch.no_grad():
        (found,) = reward.colours(IMAGES[0], [box], "cup")
        pixels = clip.transformers_crop(IMAGES[0][None, :, 4:30, 8:40], ref.SIDE)
        image = reward.clip.clip.get_image_features(pixel_values=pixels).pooler_output[0]
        likely = {}
        for colour in geneval.COLOURS:
            texts = [
                f"a photo of a {colour} cup",
                f"a photo of a {colour}-colored cup",
                f"a photo of a {colour} object",
            ]
            ids = torch.cat([reward.clip.tokenize(text) for text in texts])
            words = F.normalize(reward.clip.clip.get_text_features(input_ids=ids).pooler_output, dim=-1).mean(0)
            likely[colour] = float(F.cosine_similarity(image, words, dim=0))
    assert found == max(likely, key=likely.get)
    assert geneval.IMAGENET[0] != preprocess.MEAN


def test_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    with pytest.raises(ValueError, match="is a qwen2_vl; it takes owlv2, grounding-dino"):
        rewards.load(f"geneval={tmp_path}")
