"""What is known of each reward, for `ttsnap rewards` and the documentation. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One reward.

    Attributes:
        name: as `--reward` takes it.
        judges: what it says, and on which scale.
        weights: where they come from.
        tokenizer: hub repository, where it needs one apart from the weights.
        look_tflop: TFLOP of one look; None where it depends on the user.
        text_tflop: TFLOP of reading one prompt, once.
        million_parameters: None where it depends on the user.
        bytes_each: of a parameter: four in fp32, two in bfloat16.
        trainable: whether `ttsnap train` makes it noise-aware.
        licence: of the weights as far as known; check it yourself.
    """

    name: str
    judges: str
    weights: str
    tokenizer: str | None = None
    look_tflop: float | None = None
    text_tflop: float = 0.0
    million_parameters: float | None = None
    trainable: bool = False
    licence: str = ""
    bytes_each: int = 4

    @property
    def gib(self) -> float | None:
        """GiB of its weights in memory; None where that depends on the user."""
        return None if self.million_parameters is None else self.million_parameters * self.bytes_each * 1e6 / 2**30

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self) | {"gib": self.gib}


_QWEN = "Qwen/Qwen2-VL-7B-Instruct"
_OPENAI, _LAION = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

# TFLOP and parameters are printed by benchmarks/rewards.py.
ENTRIES = (
    Entry("shapes", "the embedded model's pictures: are things, colours and places right?", "part of ttsnap", None,
          0.0000177, 0.0000018, 0.24, True, "Apache-2.0"),
    Entry("shapes-aware", "the same, foretold from the denoiser's features, without a decode", "part of ttsnap", None,
          0.0000243, 0.0000018, 0.65, False, "Apache-2.0"),
    Entry("shapes-hard", "the harder level's: are holes right as well?", "part of ttsnap", None,
          0.0000384, 0.0000025, 0.24, True, "Apache-2.0"),
    Entry("shapes-hard-aware", "the same, foretold from the denoiser's features, without a decode", "part of ttsnap",
          None, 0.0000540, 0.0000025, 0.66, False, "Apache-2.0"),
    Entry("shapes-checker", "the embedded model's pictures, exactly: share of what is asked for, 0 to 1",
          "part of ttsnap", None, 0.0, 0.0, 0.0, False, "Apache-2.0"),
    Entry("shapes-hard-checker", "the harder level's pictures, exactly", "part of ttsnap", None, 0.0, 0.0, 0.0, False,
          "Apache-2.0"),
    Entry("imagereward", "human preference; raw number, about -2 to 2", "THUDM/ImageReward ImageReward.pt",
          "google-bert/bert-base-uncased", 0.138, 0.0, 446.2, True, "Apache-2.0"),
    Entry("pickscore", "human preference; exp(logit_scale) x cosine, about 15 to 25", "yuvalkirstain/PickScore_v1",
          _LAION, 0.335, 0.047, 986.1, True, "not stated with the weights; code MIT"),
    Entry("hpsv2", "human preference; cosine, about 0.2 to 0.35", "xswu/HPSv2 HPS_v2_compressed.pt", _LAION, 0.335,
          0.047, 986.1, True, "Apache-2.0"),
    Entry("hpsv2.1", "the same, later weights", "xswu/HPSv2 HPS_v2.1_compressed.pt", _LAION, 0.335, 0.047, 986.1, True,
          "Apache-2.0"),
    Entry("clipscore", "does the image fit the prompt? 100 x cosine, about 10 to 35", _OPENAI, _OPENAI, 0.162, 0.013,
          427.6, True, "not stated with the weights; code MIT"),
    Entry("aesthetic", "is it beautiful? about 1 to 10; does not read the prompt",
          f"trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth, and {_OPENAI}", None, 0.162, 0.0, 304.9, True,
          "head Apache-2.0"),
    Entry("geneval", "GenEval's prompts: are objects, counts, colours, places right? share, 0 to 1",
          f"google/owlv2-large-patch14-ensemble, another OWLv2 or a Grounding DINO; and {_OPENAI}", _OPENAI,
          licence="Apache-2.0"),
    Entry("hpsv3", "human preference; mean of a distribution, about 0 to 15", "MizzenAI/HPSv3 HPSv3.safetensors", _QWEN,
          11.883, 0.0, 7748.6, False, "not stated with the weights; code MIT", 2),
    Entry("mps", "human preference under a condition; exp(logit_scale) x cosine, about 5 to 20",
          "mps=FILE (MPS_overall_checkpoint_diffsynth.safetensors of DiffSynth-Studio/QualityMetric_reward_pretrained)",
          _LAION, 0.397, 0.047, 1104.6, False, "not stated"),
    Entry("unifiedreward", "mean of three written ratings (alignment, coherence, style), 1 to 5",
          "CodeGoat24/UnifiedReward-2.0-qwen-7b, or another of its sizes", None, 9.634, 0.0,
          8292.2, False, "MIT", 2),
    Entry("vqascore", 'does the image show the prompt? probability of "Yes", 0 to 1',
          "zhiqiulin/clip-flant5-xxl, a Qwen-VL model, or a server's address", None, 7.332, 0.0, 11459.8, False,
          "Apache-2.0", 2),
    Entry("vlm", "a vision-language model's rating, 0 to 10", "your own server: TTSNAP_VLM_URL, _MODEL, _KEY"),
)  # fmt: skip

OTHERS = (
    ("NAME=PATH", "the same reward with weights of your own: a file, or the directory that holds it"),
    ("NAME+RUN", "noise-aware: the directory of a run of `ttsnap train`, or of published checkpoints"),
    ("module:function", "any callable of your own: images, prompts, sigma -> one number per image"),
)
