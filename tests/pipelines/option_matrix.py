"""Options of loading x families of models: each cell is run on a tiny model against the stock pipeline with the same.

    python -m tests.pipelines.option_matrix --write docs/models.md

A cell is `exact` where the picture of a seed is that of the stock call, bit for bit, and the same but for rounding
where the seed runs in a batch; else it is what ttsnap says.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import tempfile
import warnings
from collections.abc import Container, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from tests.pipelines import conditioned, tiny, tiny_flow, tiny_sd
from tests.pipelines.test_quantization import INT8, NF4, without_a_gpu, write_gguf
from ttsnap.live.session import load_sampler
from ttsnap.pipelines.caches import Cache, read_cache
from ttsnap.pipelines.loading import load_model, place, quiet_libraries
from ttsnap.pipelines.outputs import as_images
from ttsnap.pipelines.sampler import Sampler

BEGIN, END = "<!-- options -->", "<!-- end -->"
SMALL = {"num_inference_steps": 3, "height": 32, "width": 32}
T5 = {"max_sequence_length": 12}
FAMILIES = {
    "FLUX": (tiny.flux, {**SMALL, **T5}),
    "SDXL": (tiny_sd.sdxl, SMALL),
    "SD 1.5": (tiny_sd.stable_diffusion, SMALL),
    "SD 3": (partial(tiny_sd.sd3, channels=16), {**SMALL, **T5}),
    "FLUX.2 Klein": (tiny_flow.flux2_klein, {**SMALL, "guidance_scale": 3.0, "max_sequence_length": 96}),
    "Qwen-Image": (tiny_flow.qwen_image, {**SMALL, "true_cfg_scale": 3.0, "negative_prompt": "blurred"}),
    "Z-Image": (tiny_flow.z_image, {**SMALL, "guidance_scale": 4.0, "max_sequence_length": 128}),
    "Sana": (partial(tiny_flow.sana, layers=2), {**SMALL, "max_sequence_length": 48, "use_resolution_binning": False}),
    "PixArt-Sigma": (tiny_flow.pixart, {**SMALL, **T5, "use_resolution_binning": False}),
}
PROMPT = "a red <kitten>"
ROUNDED = 2e-4


def denoiser_of(pipe: Any) -> tuple[str, Any]:
    part = "transformer" if getattr(pipe, "transformer", None) is not None else "unet"
    return part, getattr(pipe, part)


# Each option gives what ttsnap is told, and changes the stock pipeline in the same way.


def lora(pipe: Any, folder: Path) -> dict[str, Any]:
    part, model = denoiser_of(pipe)
    name, layer = next((n, m) for n, m in model.named_modules() if n.endswith("to_v"))
    random = torch.Generator().manual_seed(5)
    down, up = (torch.randn(*shape, generator=random) for shape in ((4, layer.in_features), (layer.out_features, 4)))
    save_file({f"{part}.{name}.lora_A.weight": down, f"{part}.{name}.lora_B.weight": up}, folder / "a.safetensors")
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(str(folder / "a.safetensors"), adapter_name="a")
        pipe.set_adapters(["a"], [0.5])
    return {"lora": f"{folder / 'a.safetensors'}:.5"}


def embedding(pipe: Any, folder: Path) -> dict[str, Any]:
    width = pipe.text_encoder.get_input_embeddings().weight.shape[-1]
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(5))
    save_file({"<kitten>": vectors}, folder / "a.safetensors")
    if hasattr(pipe, "load_textual_inversion"):
        pipe.load_textual_inversion(vectors, token="<kitten>")
    return {"embedding": str(folder / "a.safetensors")}


def another(part: str):
    def swap(pipe: Any, folder: Path) -> dict[str, Any]:
        old = getattr(pipe, part)
        torch.manual_seed(7)
        new = type(old).from_config(old.config) if part == "vae" else type(old)(old.config)
        new.eval().save_pretrained(folder / part)
        pipe.register_modules(**{part: type(old).from_pretrained(folder / part).eval()})
        return {part: str(folder / part)}

    return swap


def scheduler(pipe: Any, folder: Path) -> dict[str, Any]:
    config = pipe.scheduler.config
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if "FlowMatch" in config._class_name else {}
    if flow and not config.use_dynamic_shifting:
        flow["flow_shift"] = config.shift
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(config, solver_order=3, **flow)
    return {"scheduler": "UniPCMultistep,solver_order=3"}


def gguf(pipe: Any, folder: Path) -> dict[str, Any]:
    part, model = denoiser_of(pipe)
    file = write_gguf(model.state_dict(), folder / "a.gguf")
    if hasattr(type(model), "from_single_file"):
        options = {"config": pipe.name_or_path, "subfolder": part, "torch_dtype": torch.float32}
        quantized = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
        new = type(model).from_single_file(str(file), quantization_config=quantized, **options)
        pipe.register_modules(**{part: new})
    return {"model": str(file), "config": pipe.name_or_path}


def cast(pipe: Any, folder: Path) -> dict[str, Any]:
    model = denoiser_of(pipe)[1]
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return {"quantize": "fp8-cast"}


def torchao(kind: str, config: str):
    def quantize(pipe: Any, folder: Path) -> dict[str, Any]:
        from torchao import quantization

        part, model = denoiser_of(pipe)
        how = diffusers.TorchAoConfig(getattr(quantization, config)())
        options = {"subfolder": part, "torch_dtype": torch.float32}
        pipe.register_modules(
            **{part: type(model).from_pretrained(pipe.name_or_path, quantization_config=how, **options)}
        )
        return {"quantize": kind}

    return quantize


def bitsandbytes(kind: str, part: str = "", **options: Any):
    def quantize(pipe: Any, folder: Path) -> dict[str, Any]:
        name = part or denoiser_of(pipe)[0]
        how = (transformers if part else diffusers).BitsAndBytesConfig(**options)
        own = {"subfolder": name, "torch_dtype": torch.float32, "quantization_config": how}
        pipe.register_modules(**{name: type(getattr(pipe, name)).from_pretrained(pipe.name_or_path, **own)})
        return {"quantize": f"{kind}:{part}" if part else kind}

    return quantize


def cache(text: str):
    def attached(pipe: Any, folder: Path) -> dict[str, Any]:
        model = denoiser_of(pipe)[1]
        if hasattr(model, "enable_cache"):
            with suppress(Exception):  # what does not fit, ttsnap should say
                model.enable_cache(Cache(*read_cache(text)).config(lambda: pipe.current_timestep))
        return {"cache": text}

    return attached


def attention(pipe: Any, folder: Path) -> dict[str, Any]:
    model = denoiser_of(pipe)[1]
    processors = getattr(model, "attn_processors", {}).values()
    if processors and all(hasattr(one, "_attention_backend") for one in processors):
        model.set_attention_backend("_native_math")
    return {"attention": "_native_math"}


def group(pipe: Any, folder: Path) -> dict[str, Any]:
    place(pipe, torch.device("cpu"), "group")
    return {"placed": "group"}


# Pictures: the stock pipeline is made by hand, of the class that diffusers has for it.


def by_hand(kind: str, pipe: Any, **parts: Any) -> Any:
    made = getattr(diffusers, kind).from_pipe(pipe, torch_dtype=torch.float32, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def image(pipe: Any, folder: Path) -> dict[str, Any]:
    path = conditioned.picture(folder)
    given = {"image": str(path), "strength": 0.8}
    with suppress(ValueError):
        other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        return given | {"stock": (other, {"image": Image.open(path), "strength": 0.8})}
    return given


def reference(pipe: Any, folder: Path) -> dict[str, Any]:
    paths = [conditioned.picture(folder, f"{seed}.png", seed, (96, 64)) for seed in (1, 2)]
    return {"image": [str(path) for path in paths], "stock": (pipe, {"image": [Image.open(path) for path in paths]})}


def inpaint(pipe: Any, folder: Path) -> dict[str, Any]:
    path, mask = conditioned.picture(folder), conditioned.mask(folder)
    given = {"image": str(path), "mask_image": str(mask), "strength": 0.8}
    family = type(pipe).__name__.removesuffix("Pipeline")
    if not hasattr(diffusers, f"{family}InpaintPipeline"):
        return given
    more = {"image": Image.open(path), "mask_image": Image.open(mask), "strength": 0.8}
    return given | {"stock": (by_hand(f"{family}InpaintPipeline", pipe), more)}


def control(pipe: Any, folder: Path) -> dict[str, Any]:
    path, model = conditioned.picture(folder), conditioned.control_of(pipe)
    if model is None:
        conditioned.control_of(tiny.flux()).save_pretrained(folder / "control")
        return {"control": f"{path}:{folder / 'control'}"}
    model.save_pretrained(folder / "control")
    family = type(pipe).__name__.removesuffix("Pipeline")
    use = "image" if hasattr(pipe, "unet") else "control_image"
    more = {use: Image.open(path), "controlnet_conditioning_scale": 0.7}
    model = type(model).from_pretrained(folder / "control").eval()
    return {
        "control": f"{path}:{folder / 'control'}:.7",
        "stock": (by_hand(f"{family}ControlNetPipeline", pipe, controlnet=model), more),
    }


def union(pipe: Any, folder: Path) -> dict[str, Any]:
    paths = [conditioned.picture(folder, f"{seed}.png", seed) for seed in (1, 2)]
    model = conditioned.union_of(pipe if type(pipe).__name__ == "StableDiffusionXLPipeline" else tiny_sd.sdxl())
    model.save_pretrained(folder / "control")
    given = {"control": [f"{path}:{folder / 'control'}" for path in paths], "control_mode": [0, 2]}
    if type(pipe).__name__ != "StableDiffusionXLPipeline":
        return given
    more = {"control_image": [Image.open(path) for path in paths], "control_mode": [0, 2]}
    model = type(model).from_pretrained(folder / "control").eval()
    return given | {"stock": (by_hand("StableDiffusionXLControlNetUnionPipeline", pipe, controlnet=model), more)}


def adapter(pipe: Any, folder: Path) -> dict[str, Any]:
    path = conditioned.picture(folder)
    model = conditioned.adapter_of(pipe if hasattr(pipe, "unet") else tiny_sd.sdxl())
    model.save_pretrained(folder / "adapter")
    given = {"control": f"{path}:{folder / 'adapter'}"}
    if not hasattr(pipe, "unet"):
        return given
    family = type(pipe).__name__.removesuffix("Pipeline")
    model = type(model).from_pretrained(folder / "adapter").eval()
    return given | {"stock": (by_hand(f"{family}AdapterPipeline", pipe, adapter=model), {"image": Image.open(path)})}


def resembling(pipe: Any, folder: Path) -> dict[str, Any]:
    path = conditioned.picture(folder)
    known = hasattr(pipe, "unet") or type(pipe).__name__ == "FluxPipeline"
    file = conditioned.ip_adapter(pipe if known else tiny.flux(), folder)
    given = {"ip_adapter": f"{path}:.6", "ip_adapter_weights": str(file)}
    if not known:
        return given
    options: dict[str, Any] = {"subfolder": "", "weight_name": file.name}
    if not hasattr(pipe, "unet"):
        options |= {"image_encoder_pretrained_model_name_or_path": str(folder / "image_encoder")}
        options |= {"image_encoder_dtype": torch.float32}
    pipe.load_ip_adapter(str(folder), **options)
    pipe.set_ip_adapter_scale(0.6)
    pipe.image_encoder.eval()
    return given | {"stock": (pipe, {"ip_adapter_image": Image.open(path)})}


OPTIONS = {
    "`--lora`": lora,
    "`--embedding`": embedding,
    "`--vae`": another("vae"),
    "`--text-encoder`": another("text_encoder"),
    "`--scheduler UniPCMultistep,solver_order=3`": scheduler,
    "GGUF": gguf,
    "`--quantize fp8-cast`": cast,
    "`--quantize int8`": torchao("int8", "Int8WeightOnlyConfig"),
    "`--quantize fp8`": torchao("fp8", "Float8WeightOnlyConfig"),
    "`--quantize nf4:text_encoder`": bitsandbytes("nf4", "text_encoder", **NF4),
    "`--quantize nf4`": bitsandbytes("nf4", **NF4),
    "`--quantize bnb-int8`": bitsandbytes("bnb-int8", **INT8),
    "`--offload group`": group,
    "`--attention _native_math`": attention,
    "`--cache FirstBlock`": cache("FirstBlock,threshold=.5"),
    "`--cache TaylorSeer`": cache(
        "TaylorSeer,cache_interval=2,disable_cache_before_step=1,taylor_factors_dtype=float32"
    ),
    "`--cache PAB`": cache("PAB,spatial_attention_block_skip_range=2"),
    "`--image` with `--strength`": image,
    "`--image` twice": reference,
    "`--image` with `--mask`": inpaint,
    "`--control` of a ControlNet": control,
    "`--control` twice, of a union": union,
    "`--control` of a T2I adapter": adapter,
    "`--ip-adapter`": resembling,
}
NEEDED = {  # the package, by the kind of quantization
    **dict.fromkeys(("int8", "fp8"), "torchao"),
    **dict.fromkeys(("nf4:text_encoder", "nf4", "bnb-int8"), "bitsandbytes"),
}


def cell(directory: Path, arguments: dict[str, Any], option: Any, folder: Path) -> str:
    """What one option does with one family."""

    def stock() -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(3)
        torch.manual_seed(3)  # some encode their picture with noise of torch's own generator
        given = {
            name: value
            for name, value in (arguments | more).items()
            if name in signature(type(pipe).__call__).parameters
        }
        return as_images(pipe(prompt=PROMPT, generator=generator, output_type="np", **given), torch.device("cpu"))

    pipe = diffusers.DiffusionPipeline.from_pretrained(str(directory))
    pipe.set_progress_bar_config(disable=True)
    more: dict[str, Any] = {}
    plain = stock()
    given, expected = option(pipe, folder), None
    pipe, more = given.pop("stock", (pipe, {}))
    try:
        expected = stock()
    except Exception as error:  # ttsnap should say so in a sentence
        failed = str(error)
    try:
        if how := given.pop("placed", None):
            own = load_model(str(directory))
            place(own, torch.device("cpu"), how)
            sampler = Sampler(own, example=PROMPT, **arguments)
        else:
            sampler = load_sampler(given.pop("model", str(directory)), "cpu", prompt=PROMPT, **given, **arguments)
        alone, batch = ([3], [3, 4, 5])
        made, among = (
            sampler.look(sampler.advance(sampler.start([PROMPT] * len(seeds), seeds), sampler.num_steps))[:1]
            for seeds in (alone, batch)
        )
    except ValueError as error:
        said = str(error).partition(". If you were trying")[0]  # transformers' advice about hubs
        return said.replace(str(folder), "").replace(str(directory), "the model").lstrip("/")
    if expected is None:
        return f"works, and the stock pipeline does not: {failed}"
    if how is None and "attention" not in given and torch.equal(expected, plain):
        return "has no effect"
    if (apart := (made - expected).abs().max().item()) > 0:
        return f"{apart:.1e} apart"
    apart = (among - expected).abs().max().item()  # sums of a batch are rounded otherwise
    return "exact" if apart < ROUNDED else f"{apart:.1e} apart in a batch"


def matrix(
    only: str = "", options: str = "", done: Container[tuple[str, str]] = (), *, exactly: bool = False
) -> Iterator[tuple[str, str, str]]:
    """Option, family and what was found, for all of them, or those whose name contains (or `exactly`: is) `only`."""
    for family, (build, arguments) in FAMILIES.items():
        if only not in family or (exactly and only != family):
            continue
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name) / "model"
            build().save_pretrained(directory)
            for title, option in OPTIONS.items():
                if (title, family) in done or not any(part in title for part in options.split(",")):
                    continue
                folder = Path(name) / str(len(title))
                folder.mkdir(exist_ok=True)
                package = NEEDED.get(title.strip("`").removeprefix("--quantize "))
                if package and importlib.util.find_spec(package) is None:
                    yield title, family, f"not run: {package} is not installed"
                    continue
                with without_a_gpu() if package == "bitsandbytes" else nullcontext():
                    found = cell(directory, arguments, option, folder)
                yield title, family, found


def table(found: dict[tuple[str, str], str]) -> str:
    """Markdown: exact or the number of the sentence below."""
    order = [(title, family) for family in FAMILIES for title in OPTIONS if (title, family) in found]
    sentences = list(dict.fromkeys(found[cell] for cell in order if found[cell] != "exact"))
    lines = [f"| option | {' | '.join(FAMILIES)} |", "|---" * (len(FAMILIES) + 1) + "|"]
    for title in OPTIONS:
        row = [found.get((title, family), "-") for family in FAMILIES]  # -: not run
        shown = [text if text in ("exact", "-") else f"({sentences.index(text) + 1})" for text in row]
        lines.append(f"| {title} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for number, text in enumerate(sentences, 1))])


def read_table(text: str) -> dict[tuple[str, str], str]:
    """What `table` wrote."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    sentences = dict(re.findall(r"^(\d+)\. (.*)$", text, re.M))
    return {
        (row[0], family): sentences[cell[1:-1]] if cell[0] == "(" else cell
        for row in rows[1:]
        for family, cell in zip(rows[0][1:], row[1:], strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a family's name")
    parser.add_argument("--options", default="", help="parts of options' names, by commas")
    parser.add_argument("--log", type=Path, help="keep what was found there, a JSON object a line, and go on from it")
    parser.add_argument("--write", type=Path, help="a Markdown file with the marks between which the table goes")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet_libraries()
    found = {}
    if asked.log and asked.log.exists():
        found = {(t, f): text for t, f, text in map(json.loads, asked.log.read_text().splitlines())}
    for title, family, text in matrix(asked.only, asked.options, found):
        found[title, family] = text
        print(f"{family}, {title}: {text}", flush=True)
        if asked.log:
            with asked.log.open("a") as log:
                print(json.dumps([title, family, text]), file=log)
    if asked.write:
        before, rest = asked.write.read_text().split(BEGIN)
        asked.write.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main()
