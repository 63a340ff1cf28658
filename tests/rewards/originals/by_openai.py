"""CLIPScore and the aesthetic predictor as ImageReward's package has them, on OpenAI's own CLIP, random weights."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import clip
import torch
from clip.clip import _transform
from clip.model import CLIP
from common import read, shake, write

folder = Path(sys.argv[1])
package = ModuleType("ImageReward")
package.__path__ = list(find_spec("ImageReward").submodule_search_locations)
sys.modules["ImageReward"] = package


def main() -> None:
    from ImageReward.models.AestheticScore import AestheticScore
    from ImageReward.models.CLIPScore import CLIPScore

    model = shake(CLIP(768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12).eval())
    clip.load = lambda *_, **__: (model, _transform(224))  # in place of a download
    torch.save(model.state_dict(), folder / "clip" / "model.pt")
    scorers = {"clipscore": CLIPScore(None), "aesthetic": AestheticScore(None).eval()}
    shake(scorers["aesthetic"].mlp)
    torch.save(scorers["aesthetic"].mlp.state_dict(), folder / "aesthetic-model.pth")
    prompts, images = read(folder)
    files = [str(image) for image in images]
    with torch.no_grad():
        rewards = {
            name: [scorer.inference_rank(prompt, files)[1] for prompt in prompts] for name, scorer in scorers.items()
        }
    write(folder, rewards["clipscore"], aesthetic=rewards["aesthetic"])


main()
