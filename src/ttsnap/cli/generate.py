"""`ttsnap generate`: from prompts and a budget to the best images, with a pruning board and a record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ttsnap.cli.options import (
    MAX_SEED,
    MAX_STEPS,
    AttentionSlicing,
    CallArguments,
    Compile,
    Config,
    Offload,
    RayAddress,
    VaeSlicing,
    VaeTiling,
    Weights,
    Workers,
    check_ranges,
    given,
    read_call,
    read_policy,
    read_prompts,
    read_size,
    read_weights,
)

_SEARCH, _MODEL, _PICTURES, _OUTPUT = "Search", "Model", "Pictures and videos", "Output"


def generate(
    prompt: Annotated[
        list[str] | None, typer.Argument(help="What to paint; several prompts give several images.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="File with prompts: .txt (one per line) or .json (a list of strings).")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="Output folder, local or such as s3://bucket/x (default: out/ and the prompt).",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="`shapes` (embedded), a hub id, a diffusers directory or a .safetensors file.", rich_help_panel=_MODEL
        ),
    ] = "shapes",
    reward: Annotated[
        str | None,
        typer.Option(
            help="Reward (see `ttsnap rewards`), module:function, or several by commas (rank sum).",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    weights: Weights = None,
    report_reward: Annotated[
        str | None,
        typer.Option(
            help="Held-out reward(s): judge finished images only, warn when they part from --reward.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="best-of-n, halving, early-selection, or a policy FILE.json (default: tuned, else halving).",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    candidates: Annotated[
        int | None,
        typer.Option(help="Candidates started per prompt (default: 32; 8 for shapes).", rich_help_panel=_SEARCH),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Or what a prompt may cost: 200NFE, 2000TFLOP, 50GFLOP or 30s.", rich_help_panel=_SEARCH),
    ] = None,
    rungs: Annotated[
        str | None, typer.Option(help="Steps at which to look, such as 3,7,12.", rich_help_panel=_SEARCH)
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Share that survives each look, such as .4,.4,.5.", rich_help_panel=_SEARCH)
    ] = None,
    preview: Annotated[
        str | None,
        typer.Option(
            help="What early looks see: full, tiny[=DIR], small[=PIXELS] or linear; finished images are always full.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    diversity: Annotated[
        str | None,
        typer.Option(help="Push candidates of a prompt apart: negtome, repel (FLUX, SDXL).", rich_help_panel=_SEARCH),
    ] = None,
    diversity_options: Annotated[
        str | None, typer.Option(help="Its parameters, such as merging_alpha=1.2,t_end=800.", rich_help_panel=_SEARCH)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoiser calls of a finished image.", rich_help_panel=_MODEL)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first candidate; the others count up.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="Image size in pixels: 512 or 768x512 (width x height).", rich_help_panel=_MODEL)
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the model.", rich_help_panel=_MODEL)] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What guidance leads away from.", rich_help_panel=_MODEL)
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="euler, euler-karras, ddim, dpm, dpm-karras, in place of its own.", rich_help_panel=_MODEL),
    ] = None,
    call: CallArguments = None,
    image: Annotated[
        Path | None, typer.Option(help="Start from this picture (image-to-image).", rich_help_panel=_PICTURES)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far from it, above 0 and at most 1.", rich_help_panel=_PICTURES)
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Paint only where this picture is white (inpainting).", rich_help_panel=_PICTURES),
    ] = None,
    control_image: Annotated[
        Path | None, typer.Option(help="Be led by this picture (ControlNet pipelines).", rich_help_panel=_PICTURES)
    ] = None,
    look_frames: Annotated[
        str | None,
        typer.Option(
            help="Of videos, the frames that are judged: first,middle,last or 0,8.", rich_help_panel=_PICTURES
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", rich_help_panel=_MODEL)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.", rich_help_panel=_MODEL)] = None,
    offload: Offload = None,
    compile: Compile = False,
    attention_slicing: AttentionSlicing = False,
    vae_slicing: VaeSlicing = False,
    vae_tiling: VaeTiling = False,
    config: Config = None,
    max_batch: Annotated[
        int | None,
        typer.Option(help="Most candidates in one batch (halved when memory runs out).", rich_help_panel=_MODEL),
    ] = None,
    top: Annotated[int, typer.Option(help="Save this many of the best finished images.", rich_help_panel=_OUTPUT)] = 1,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also run best-of-N at the same cost and show it.", rich_help_panel=_OUTPUT),
    ] = False,
    board: Annotated[bool, typer.Option(help="Draw the pruning board.", rich_help_panel=_OUTPUT)] = True,
    workers: Workers = None,
    ray_address: RayAddress = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Find the best image for a prompt under a compute budget.

    Try: ttsnap generate "a red circle left of a blue square"
    """
    from ttsnap.cli.generating import Request, execute
    from ttsnap.cli.scaling import Scale
    from ttsnap.cost import MAX_CANDIDATES
    from ttsnap.diversity import parse
    from ttsnap.pictures import Pictures, parse_frames
    from ttsnap.storage import location

    check_ranges(
        candidates=(candidates, 1, MAX_CANDIDATES),
        seed=(seed, 0, MAX_SEED),
        steps=(steps, 1, MAX_STEPS),
        max_batch=(max_batch, 1, MAX_CANDIDATES),
    )
    execute(
        Request(
            prompts=read_prompts(prompt or [], prompts),
            out=None if out is None else location(out, absolute=True),
            model=model,
            reward=reward,
            policy=read_policy(policy, rungs, keep),
            candidates=candidates,
            budget=budget,
            seed=seed,
            top=top,
            compare=compare,
            board=board,
            options=given(
                num_inference_steps=steps,
                guidance_scale=guidance,
                negative_prompt=negative_prompt,
                scheduler=scheduler,
                max_batch=max_batch,
                look_frames=parse_frames(look_frames),
                **read_size(size),
                **read_call(call),
            ),
            pictures=Pictures(image, mask, control_image, strength),
            device=device,
            dtype=dtype,
            loading={
                "offload": offload,
                "compile": compile,
                "attention_slicing": attention_slicing,
                "vae_slicing": vae_slicing,
                "vae_tiling": vae_tiling,
                "config": config,
            },
            diversity=parse(diversity, diversity_options),
            preview=preview,
            scale=Scale(workers, ray_address),
            weights=read_weights(weights),
            report=report_reward,
        ),
        as_json=json,
    )
