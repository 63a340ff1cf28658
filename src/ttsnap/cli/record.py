"""`ttsnap record`: from prompts to the images or the rewards of every candidate after every call."""

from __future__ import annotations

from typing import Annotated

import typer

from ttsnap.cli.options import (
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    AttentionSlicing,
    CallArguments,
    Compile,
    Config,
    Offload,
    RayAddress,
    VaeSlicing,
    VaeTiling,
    Workers,
    check_ranges,
    given,
    read_call,
    read_calls,
    read_prompts,
    read_range,
    read_size,
)

_MODEL, _WHAT = "Model", "What is recorded"


def record(
    out: Annotated[
        str, typer.Option(help="Folder to write, local or such as s3://bucket/x; the same command goes on with it.")
    ],
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="File with prompts (.txt, one per line, or .json), or shapes:train, shapes:held-out."),
    ] = None,
    prompt_range: Annotated[
        str | None, typer.Option(help="Part of the prompts, such as 0:400.", rich_help_panel=_WHAT)
    ] = None,
    per_prompt: Annotated[int, typer.Option(help="Candidates per prompt.", rich_help_panel=_WHAT)] = 8,
    reward: Annotated[
        str | None,
        typer.Option(
            help="Write these rewards straight into a recording, and no images.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    calls: Annotated[
        str | None,
        typer.Option(help="Calls to look after, such as 1,5,20 (default: all).", rich_help_panel=_WHAT),
    ] = None,
    store_size: Annotated[
        int | None,
        typer.Option(help="Shorter side of stored images, pixels (default: as they are).", rich_help_panel=_WHAT),
    ] = None,
    image_format: Annotated[
        str, typer.Option("--format", help="png, or webp (lossless).", rich_help_panel=_WHAT)
    ] = "png",
    preview: Annotated[
        str | None,
        typer.Option(
            help="What early looks see: full, tiny[=DIR], small[=PIXELS] or linear; finished images are always full.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    diversity: Annotated[
        str | None,
        typer.Option(help="Push candidates of a prompt apart: negtome, repel (FLUX, SDXL).", rich_help_panel=_WHAT),
    ] = None,
    diversity_options: Annotated[
        str | None, typer.Option(help="Its parameters, such as merging_alpha=1.2,t_end=800.", rich_help_panel=_WHAT)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Candidate c of prompt p has this seed + p x candidates per prompt + c.")
    ] = 0,
    model: Annotated[
        str,
        typer.Option(
            help="`shapes` (embedded), a hub id, a diffusers directory or a .safetensors file.", rich_help_panel=_MODEL
        ),
    ] = "shapes",
    steps: Annotated[
        int | None, typer.Option(help="Denoiser calls of a finished image.", rich_help_panel=_MODEL)
    ] = None,
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
    look_frames: Annotated[
        str | None,
        typer.Option(
            help="Of videos, the frames looked at: first,middle,last (default) or indices; images need one.",
            rich_help_panel=_WHAT,
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
    workers: Workers = None,
    ray_address: RayAddress = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")] = False,
) -> None:
    """Sample candidates and record every x0 estimate: its image, or with --reward what it is worth.

    Images lie in OUT/p0000/id000/s00.png: prompt 0, candidate 0, after 1 denoiser call.

    Try: ttsnap record --prompts shapes:held-out --prompt-range 0:10 --out tree
    """
    from ttsnap.cli.recording import Request, execute
    from ttsnap.cli.scaling import Scale
    from ttsnap.cost import MAX_CANDIDATES
    from ttsnap.diversity import parse
    from ttsnap.pictures import parse_frames
    from ttsnap.storage import location

    check_ranges(
        per_prompt=(per_prompt, 1, MAX_CANDIDATES),
        seed=(seed, 0, MAX_SEED),
        steps=(steps, 1, MAX_STEPS),
        max_batch=(max_batch, 1, MAX_CANDIDATES),
        store_size=(store_size, 1, MAX_SIDE),
    )
    texts = read_prompts(prompt or [], prompts, verb="record --out DIR")
    execute(
        Request(
            prompts=texts,
            part=read_range(prompt_range, len(texts)),
            per_prompt=per_prompt,
            rewards=reward,
            calls=read_calls(calls),
            store_size=store_size,
            image_format=image_format,
            seed=seed,
            out=location(out, absolute=True),
            model=model,
            options=given(
                num_inference_steps=steps,
                guidance_scale=guidance,
                negative_prompt=negative_prompt,
                scheduler=scheduler,
                look_frames=parse_frames(look_frames),
                **read_size(size),
                **read_call(call),
            ),
            max_batch=max_batch,
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
        ),
        as_json=json,
    )
