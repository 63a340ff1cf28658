"""`ttsnap record`: from prompts to the images or the rewards of every candidate after every call."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ttsnap.cli.options import (
    OUTPUT,
    RECORDED,
    AsJson,
    DryRun,
    ModelOptions,
    PictureOptions,
    WorkerOptions,
    Workers,
    read_calls,
    read_prompts,
    read_range,
    tell,
)
from ttsnap.core import MAX_CANDIDATES
from ttsnap.files.pictures import LONGEST_SIDE
from ttsnap.live.settings import MAX_SEED, ModelSettings, check_ranges, pictures_key, reward_contents
from ttsnap.pipelines.conditions import ARGUMENTS, Pictures

if TYPE_CHECKING:
    from ttsnap.live.forecast import Work
    from ttsnap.pipelines.sampler import Sampler

What = Parameter(group=RECORDED)


def record(
    *prompt: str,
    out: Annotated[str, Parameter(group=OUTPUT)],
    prompts: Annotated[str | None, What] = None,
    prompt_column: Annotated[str | None, What] = None,
    prompt_range: Annotated[str | None, What] = None,
    per_prompt: Annotated[int, What] = 8,
    reward: Annotated[str | None, What] = None,
    calls: Annotated[str | None, What] = None,
    features: Annotated[bool, Parameter(negative="", group=RECORDED)] = False,
    store_size: Annotated[int | None, What] = None,
    image_format: Annotated[str, Parameter(name="--format", group=RECORDED)] = "png",
    seed: Annotated[int, What] = 0,
    model: ModelOptions = ModelSettings(),
    pictures: PictureOptions = Pictures(),
    workers: WorkerOptions = Workers(),
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Sample candidates and record every x0 estimate: its image, or with --reward what it is worth.

    Images lie in OUT/p0000/id000/s00.png: prompt 0, candidate 0, after 1 denoiser call.

    Try: ttsnap record --prompts shapes:held-out --prompt-range 0:10 --out tree

    Args:
        prompt: Prompts.
        out: Folder to write, local or such as s3://bucket/x; the same command goes on with it.
        prompts: File with prompts (.txt, one per line, .csv, .tsv, .json or .jsonl), or shapes:train, shapes:held-out.
        prompt_column: Column of the table or JSON with the prompts, by name or number.
        prompt_range: Part of the prompts, such as 0:400.
        per_prompt: Candidates per prompt.
        reward: Write these rewards straight into a recording, and no images.
        calls: Calls to look after, such as 1,5,20 (default: all, with --features the last).
        features: With --reward: keep what the denoiser knows early, to train a judge of features on it.
        store_size: Shorter side of stored images, pixels (default: as they are).
        image_format: png, or webp (lossless).
        seed: Candidate c of prompt p has this seed + p x candidates per prompt + c.
    """
    import json as encoder

    from ttsnap import rewards
    from ttsnap.cli.progress import Board
    from ttsnap.cli.workers import PARTLY, failures_file, quietly, report_failures, run
    from ttsnap.cluster.record import Record
    from ttsnap.files.storage import location
    from ttsnap.live.judging import try_own
    from ttsnap.recordings.image_tree import FORMATS

    check_ranges(
        per_prompt=(per_prompt, 1, MAX_CANDIDATES), seed=(seed, 0, MAX_SEED), store_size=(store_size, 1, LONGEST_SIDE)
    )
    texts = read_prompts(prompt, prompts, verb="record --out DIR", column=prompt_column, wildcards=True)
    part, place = read_range(prompt_range, len(texts)), location(out, absolute=True)
    if image_format not in FORMATS:
        raise ValueError(f"--format is {' or '.join(FORMATS)}, got {image_format!r}")
    if reward is not None:
        rewards.names_of(reward)
        if store_size is not None or image_format != "png":
            raise ValueError("with --reward no images are stored: leave out --store-size and --format")
        try_own(reward, texts[0], None, model.reward_timeout)
    elif features:
        raise ValueError("--features are kept beside rewards: add --reward NAME")
    if model.draft_cache is not None:
        raise ValueError("--draft-cache is for searches, which finish some candidates again; record with --cache")
    workers.check_device(model.device, model.reward_device)
    if dry_run:
        looked = (read_calls(calls), features, image_format, store_size)
        tell(_planned(model, texts, part, per_prompt, reward, pictures, *looked), json)
        return
    job = Record(
        load_sampler=partial(quietly, model.sampler, texts[0], pictures),
        load_rewards=partial(model.load_rewards, reward) if reward else None,
        describe=partial(described, model, pictures, seed, reward),
        prompts=texts,
        part=part,
        per_prompt=per_prompt,
        out=place,
        seed=seed,
        calls=read_calls(calls),
        features=features,
        store_size=store_size,
        image_format=image_format,
    )
    show = Board("recording", "images", silent=json, workers=not workers.alone)
    outcome = run(job, workers, place, show)
    of_part = part if reward is not None else range(len(texts))
    failures = report_failures(outcome, failures_file(place, inside=reward is None), lambda p: texts[of_part[p]])
    if json:
        report = {"out": str(place), "prompts": len(part), "candidates": per_prompt, **outcome.plan.report}
        print(encoder.dumps(report | {"failures": failures, **show.report()}, indent=1))
    elif not show.images and not failures:
        print(f"{place} is complete already; nothing was run again.")
    else:
        print(f"{place}: {len(part)} prompts x {per_prompt} candidates; {show.summary()}")
    if failures:
        raise SystemExit(PARTLY)


def _planned(
    model: ModelSettings,
    texts: list[str],
    part: range,
    per_prompt: int,
    reward: str | None,
    pictures: Pictures,
    calls: list[int] | None,
    features: bool,
    image_format: str,
    store_size: int | None,
) -> Work:
    """What would be recorded."""
    from ttsnap.cli.workers import quietly
    from ttsnap.live.forecast import sampled
    from ttsnap.recordings.recorder import chosen_calls, looks

    sampler = quietly(model.sampler, texts[0], pictures)
    judges = model.load_rewards(reward, sampler.device) if reward else {}
    steps = looks(calls, features, sampler.num_steps) if judges else chosen_calls(calls, sampler.num_steps)
    images = len(part) * per_prompt * len(steps)
    scale = min(1.0, (store_size or 1e9) / min(sampler.width, sampler.height))
    picture = round(2 * sampler.width * sampler.height * scale**2 * (0.7 if image_format == "webp" else 1))
    disk = images * 8 * len(judges) if judges else images * picture
    kept = ", ".join(judges) if judges else f"{images} images"
    what = f"{len(part)} prompts x {per_prompt} candidates, {kept} after {len(steps)} of {sampler.num_steps} calls"
    return sampled(what, sampler, judges, texts[0], len(part), per_prompt, steps, disk)


def described(
    model: ModelSettings, pictures: Pictures, seed: int, reward: str | None, sampler: Sampler
) -> dict[str, Any]:
    """Everything that decides the images, and their rewards if they are judged; kept with them."""
    shown = pictures_key(pictures)
    call = {name: value for name, value in sampler.call_options().items() if name not in ARGUMENTS}
    found = {"num_steps": sampler.num_steps, **call, **shown}
    found.pop("num_inference_steps", None)
    dtype = str(sampler.pipe.dtype).removeprefix("torch.")
    asked = model.key()
    asked["contents"] |= found.pop("contents") | reward_contents(reward)
    settings = {"model": model.model, "dtype": dtype, **found, "seed": seed}
    settings |= {"preview": model.preview} if sampler.preview else {}
    settings |= {"look_frames": list(sampler.look_frames)} if sampler.look_frames else {}
    names = (
        "scheduler",
        "cache",
        "attention",
        "diversity",
        "lora",
        "embedding",
        "vae",
        "text_encoder",
        "quantize",
        "contents",
    )
    return settings | {name: asked[name] for name in names if asked.get(name)}
