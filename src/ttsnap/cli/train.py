"""`ttsnap train`: from an image tree and its recording, or from recorded features, to a noise-aware reward."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ttsnap.cli.options import DATA, OUTPUT, TRAINING, AsJson, DryRun, read_calls, tell

if TYPE_CHECKING:
    from ttsnap.cli.progress import ImageProgress
    from ttsnap.live.forecast import Work
    from ttsnap.training import Report
    from ttsnap.training.judges import JudgeReport

Data, How = Parameter(group=DATA), Parameter(group=TRAINING)


def train(
    tree: Path | None = None,
    labels: Path | None = None,
    /,
    *,
    out: Annotated[Path, Parameter(group=OUTPUT)],
    judge: Annotated[str, Data] = "pictures",
    config: Path | None = None,
    reward: str | None = None,
    train_prompts: Annotated[int | None, Data] = None,
    per_prompt: Annotated[int | None, Data] = None,
    held_out: Annotated[int | None, Data] = None,
    eval_tree: Annotated[Path | None, Data] = None,
    eval_labels: Annotated[Path | None, Data] = None,
    levels: Annotated[str | None, How] = None,
    epochs_per_level: Annotated[int | None, How] = None,
    method: Annotated[str | None, How] = None,
    batch: Annotated[int | None, How] = None,
    learning_rate: Annotated[float | None, How] = None,
    seed: Annotated[int | None, How] = None,
    more: Annotated[tuple[str, ...], Parameter(name="--set", group=TRAINING)] = (),
    cpu: bool = False,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Train a reward to foretell, from noisy x0 estimates, what the finished image will be worth (TTSnap).

    The run is then a reward: --reward OUT, or shapes+OUT. On several devices: accelerate launch -m ttsnap train ...

    Try: ttsnap train tree tree.zarr --reward shapes --out run

    Or: ttsnap train --judge features recording.zarr --out run

    Args:
        tree: Image tree, as `ttsnap record` writes it; for a judge of features the recording.
        labels: Its recording, as `ttsnap label --final-only` writes it.
        out: Directory of the run; the same command goes on with it.
        judge: What is read: pictures, or features (of `ttsnap record --reward NAME --features`; no look is decoded).
        config: YAML file with settings; options given here win.
        reward: Clean reward to start from (shapes).
        train_prompts: Train on so many prompts at most.
        per_prompt: Train on so many candidates of each at most.
        held_out: Prompts from the end of TREE to evaluate on (a tenth).
        eval_tree: Evaluate on the images of this tree instead.
        eval_labels: Its recording.
        levels: Denoiser calls whose x0 estimates to learn, such as 15:1 or 12,9,6 (three quarters of the way down to
            1); always trained from clean to noisy.
        epochs_per_level: How often each image is seen (1).
        method: lora, full, or auto: LoRA where the reward is large (auto).
        batch: Images in one update, over all processes (64).
        learning_rate: At its peak (1e-4).
        seed: Of order, adapters and dropout (0).
        more: NAME=VALUE, any other setting of the config, such as preference=1 or precision=bf16.
        cpu: Do not use an accelerator that is there.
    """
    import json as encoder
    import os
    import sys
    from dataclasses import asdict

    from ttsnap.cli.progress import ImageProgress
    from ttsnap.training.config import Config, read_config

    values = read_config(config) if config else {}
    for setting in more:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, such as preference=1, got {setting!r}")
        values[name.strip()] = value.strip()
    given = {
        "tree": tree,
        "labels": labels,
        "reward": reward,
        "train_prompts": train_prompts,
        "per_prompt": per_prompt,
        "held_out": held_out,
        "eval_tree": eval_tree,
        "eval_labels": eval_labels,
        "levels": read_levels(levels),
        "epochs_per_level": epochs_per_level,
        "method": method,
        "batch": batch,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    for name, option in given.items():
        if option is not None:
            values[name] = str(option) if isinstance(option, Path) else option
    if dry_run:
        tell(_planned(values, judge, cpu=cpu), json)
        return
    if judge == "features":
        _train_judge(values, out, cpu=cpu, json=json)
        return
    if judge != "pictures":
        raise ValueError(f"--judge is pictures or features, got {judge!r}")
    resolved = Config.of(values)
    from ttsnap.files.locks import locked
    from ttsnap.training import train as fit

    first = os.environ.get("RANK", "0") == "0"
    with locked(out) if first else nullcontext(), ImageProgress("training", silent=json or not first) as progress:
        try:
            report = fit(resolved, out, cpu=cpu, on_start=progress.start, on_images=progress.advance)
        except KeyboardInterrupt:
            print(f"stopped: the same command goes on from its last checkpoint ({out})", file=sys.stderr)
            raise SystemExit(130) from None
    if not report.main:
        return
    if json:
        plain = {name: value for name, value in asdict(report).items() if name not in ("main", "levels")}
        plain |= {"out": str(out), "levels": [level._asdict() for level in report.levels], **progress.report()}
        print(encoder.dumps(plain, indent=1))
        return
    _show(report, progress)


def _planned(values: dict[str, Any], judge: str, *, cpu: bool) -> Work:
    """What would be trained."""
    import torch

    from ttsnap.live.forecast import TRAINED, Work, judged
    from ttsnap.rewards.trainable import load_trainable
    from ttsnap.training.config import Config, settings_of
    from ttsnap.training.curriculum import levels_of
    from ttsnap.training.data import open_data, updates_in_level
    from ttsnap.training.judges import JudgeSettings

    if judge == "features":
        settings = settings_of(JudgeSettings, {key: value for key, value in values.items() if key != "tree"})
        return Work(f"a judge of features: up to {settings.updates} updates of {settings.batch} candidates each")
    config = Config.of(values)
    data, test = open_data(config)
    levels = levels_of(data.tree, config.levels)
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    reward = load_trainable(config.reward, device)
    updates = updates_in_level(data, config) * len(levels)
    looked_at = test.targets.size * (2 * len(data.tree.calls) + len(levels))
    images = updates * config.batch + looked_at // TRAINED
    what = f"{len(levels)} noise levels, {updates} updates of {config.batch} images; {looked_at} looks to evaluate"
    weights = sum(parameter.numel() * parameter.element_size() for parameter in reward.parameters())
    work = judged(what, {config.reward: reward}, images, data.tree.size, device, weights * 3, config.batch, TRAINED)
    return replace(work, weights=weights)


def _train_judge(values: dict[str, Any], out: Path, *, cpu: bool, json: bool) -> None:
    """Train a judge of features with what was given."""
    import json as encoder
    from dataclasses import asdict

    import torch

    from ttsnap.cli.progress import ImageProgress
    from ttsnap.files.locks import locked
    from ttsnap.training.config import settings_of
    from ttsnap.training.judges import JudgeSettings, train_judge

    recording = values.pop("tree", None)
    if recording is None:
        raise ValueError("a judge of features needs a recording: ttsnap train --judge features REC --out DIR")
    settings = settings_of(JudgeSettings, values)
    device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
    with locked(out), ImageProgress("training", silent=json, unit="updates") as progress:
        report = train_judge(
            recording, out, settings, device=device, on_start=progress.start, on_updates=progress.advance
        )
    if json:
        print(encoder.dumps(asdict(report) | {"out": str(out)}, indent=1))
    else:
        _show_judge(report)


def _show_judge(report: JudgeReport) -> None:
    from rich.console import Console
    from rich.table import Table

    fitted, chosen, held = report.prompts
    print(
        f"{report.out}: reads {' and '.join(report.places)}; {report.parameters:,} parameters; fitted to {fitted} "
        f"prompts, chosen by {chosen}"
    )
    for name, found in sorted(report.trials.items(), key=lambda pair: -pair[1]):
        print(f"  tried {name}: Kendall tau {found:.3f}")
    table = Table("call", "noise", f"{report.reward} of the x0 picture", "judge of features", "serves", box=None)
    for level in report.levels:
        clean = "-" if level.clean is None else f"{level.clean:.2f} ± {1.96 * (level.clean_error or 0):.2f}"
        own = f"{level.judge:.2f} ± {1.96 * level.judge_error:.2f}"
        table.add_row(str(level.call), f"{level.sigma:.3g}", clean, own, "judge" if level.served else report.reward)
    Console().print(table)
    print(f"Kendall tau with the finished images' {report.reward} on {held} held-out prompts, 95 % intervals")
    print(f"use it: ttsnap generate ... --reward {report.reward}+{report.out}")


def read_levels(text: str | None) -> list[int] | None:
    """Calls such as `12,9,6`, or `15:1` for all from 15 down to 1."""
    first, colon, last = (text or "").partition(":")
    try:
        if not colon:
            return read_calls(text)
        low, high = sorted((int(first), int(last)))
    except ValueError:
        raise ValueError(f"--levels takes calls such as 15:1 or 12,9,6, got {text!r}") from None
    return list(range(high, low - 1, -1))


def _show(report: Report, progress: ImageProgress) -> None:
    from rich.console import Console
    from rich.table import Table

    levels = report.levels
    print(
        f"{report.out}: {len(levels)} noise levels, calls {levels[0].call} to {levels[-1].call}; {report.method}, "
        f"{report.parameters:,} parameters, {report.prompts} prompts"
    )
    print(progress.summary() if progress.images else "it was complete already; nothing was trained again.")
    if "after" not in report.evaluation:
        return
    table = Table("call", "Kendall tau", "MSE", "best kept at 25 %", "reward lost at 25 %", box=None)
    names = ("kendall_tau", "mse", "top_accuracy_25", "top_gap_25")
    before, after = report.evaluation["before"], report.evaluation["after"]
    for call in sorted(after, key=int):
        cells = [f"{_number(before[call][name])} -> {_number(after[call][name])}" for name in names]
        table.add_row(call, *cells)
    Console().print(table)
    print(f"on held-out prompts, clean -> noise-aware; all in {report.out / 'evaluation.json'}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
