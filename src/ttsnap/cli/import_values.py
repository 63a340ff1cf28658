"""`ttsnap import-values`: published reward values into a recording."""

from __future__ import annotations

from pathlib import Path

from ttsnap.cli.options import AsJson, DryRun, read_prompts


def import_values(
    folder: Path,
    out: Path,
    /,
    *,
    model: str | None = None,
    reward: str | None = None,
    prompts: Path | None = None,
    overwrite: bool = False,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Read published reward values ({model}_{reward}_val_{base|naft}) into one recording.

    Try: ttsnap import-values values/ flux.zarr --reward hps

    Args:
        folder: Folder of value folders, such as flux_hps_val_base/p200_i200_s00.yaml.
        out: Recording to write (a zarr directory).
        model: Which model, when there are several.
        reward: Which rewards, separated by commas, such as hps,imr (default: all).
        prompts: File with the prompts, .txt or .json, in order.
        overwrite: Replace the recording if there is one.
    """
    import json as format_json

    from rich.progress import Progress

    from ttsnap.cli.progress import console
    from ttsnap.recordings.published_values import choose, find
    from ttsnap.recordings.published_values import import_values as read

    names = reward.split(",") if reward else None
    if dry_run:
        from ttsnap.cli.options import tell
        from ttsnap.live.forecast import Work

        chosen = choose(find(folder), model, names)
        first, files = chosen[0], sum(len(one.base) + len(one.naft) for one in chosen)
        sizes = f"{first.num_prompts} prompts x {first.num_images} candidates x {len(first.base)} steps"
        told = f"{files} files of {first.model} become a recording: {sizes} ({', '.join(one.reward for one in chosen)})"
        tell(Work(told, disk=8 * files * first.num_prompts * first.num_images), json)
        return
    shown = console(json)
    texts = None if prompts is None else read_prompts([], str(prompts))
    with Progress(console=shown, transient=True, disable=shown.quiet) as bar:
        task = bar.add_task("reading", total=None)

        def show(path: Path, total: int) -> None:
            bar.update(task, total=total, advance=1, description=f"reading {path.parent.name}/{path.name}")

        recording = read(
            folder,
            out,
            model=model,
            rewards=names,
            prompts=texts,
            overwrite=overwrite,
            on_file=show,
        )
    shape = dict(zip(("prompts", "candidates", "steps", "rewards"), recording.shape, strict=True))
    if json:
        print(format_json.dumps({"recording": str(out)} | shape | {"reward_names": list(recording.rewards)}))
    else:
        print(f"{out}: {shape['prompts']} prompts x {shape['candidates']} candidates x {shape['steps']} steps", end="")
        print(f" ({', '.join(recording.rewards)}); next: ttsnap simulate {out}")
