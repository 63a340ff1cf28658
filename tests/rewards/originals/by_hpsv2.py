"""HPSv2's own `score`, on random weights of its full size."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from common import read, shake, write

folder = Path(sys.argv[1])
# Its wheel lacks this file; open_clip has it.
vocabulary = Path(find_spec("open_clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"
shutil.copy(vocabulary, Path(find_spec("hpsv2").origin).parent / "src" / "open_clip")


def main() -> None:
    from hpsv2 import img_score

    make = img_score.create_model_and_transforms
    # It would fetch LAION's weights first, which the checkpoint then replaces.
    img_score.create_model_and_transforms = lambda name, _, **options: make(name, None, **options)
    img_score.initialize_model()
    model = shake(img_score.model_dict["model"])
    file = folder / "HPS_v2_compressed.pt"
    torch.save({"state_dict": {name: tensor.half() for name, tensor in model.state_dict().items()}}, file)
    prompts, images = read(folder)
    scores = [img_score.score([str(image) for image in images], prompt, cp=str(file)) for prompt in prompts]
    write(folder, [[float(score) for score in row] for row in scores])


main()
