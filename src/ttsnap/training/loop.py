"""The training loop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from ttsnap.rewards.trainable import adapt, choose_method, load_trainable, save_memory
from ttsnap.training import tracking
from ttsnap.training.config import Config
from ttsnap.training.curriculum import Level, learning_rate, levels_of
from ttsnap.training.data import batches, open_data, updates_in_level
from ttsnap.training.evaluation import evaluate
from ttsnap.training.losses import preference, squared_error
from ttsnap.training.runs import Run

Measured = dict[str, dict[str, float | None]]


@dataclass
class Report:
    """What training came to.

    Attributes:
        out: the run.
        method: `lora` or `full`.
        parameters: how many numbers are trained.
        levels: trained, from clean to noisy.
        updates: in all levels.
        found: updates that were done before this command.
        prompts: trained on.
        evaluation: METRICS by call on held-out prompts, `before`, `during` and `after`; empty where none are held out.
        main: whether this process is the one to speak.
    """

    out: Path
    method: str
    parameters: int
    levels: list[Level]
    updates: int
    found: int
    prompts: int
    evaluation: dict[str, Measured] = field(default_factory=dict)
    main: bool = True


def train(
    config: Config,
    out: str | Path,
    *,
    cpu: bool = False,
    on_start: Callable[[int], None] | None = None,
    on_images: Callable[[int], None] | None = None,
    on_update: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Train a noise-aware reward level by level, or go on with a run.

    Runs under `accelerate launch` as well as alone: neither the number of processes nor `accumulate` changes which
    images an update holds, and both change its gradient by rounding only.

    Args:
        config: the experiment.
        out: directory of the run.
        cpu: do not use an accelerator that is there.
        on_start: called in the main process with the number of images left to train on and to evaluate.
        on_images: called in the main process with the number of images just done.
        on_update: called in the main process with each line of the log.

    Raises:
        ValueError: what was wrong with data, config or run, and what would work.
    """
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    tracking.check_trackers(config.log_with)
    data, test = open_data(config)
    levels = levels_of(data.tree, config.levels)
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # the others wait while one evaluates
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.precision,
        kwargs_handlers=[patience],
        log_with=list(config.log_with) or None,
        project_dir=out,
    )
    device, main = accelerator.device, accelerator.is_main_process

    torch.manual_seed(config.seed)
    reward = load_trainable(config.reward, device)
    method = choose_method(reward, config.method)
    run = Run(Path(out), config, method, data.fingerprint)
    run.check()
    trained = adapt(reward, method, config.rank, config.alpha)
    if config.checkpointing:
        save_memory(reward)
    adam = torch.optim.AdamW(
        trained.values(), config.learning_rate, (config.betas[0], config.betas[1]), weight_decay=config.weight_decay
    )
    model, optimiser = accelerator.prepare(reward, adam)
    stage, update = run.restore(trained, adam, accelerator.scaler)
    accelerator.wait_for_everyone()

    updates = updates_in_level(data, config)
    finished = stage == len(levels)
    calls = [call for call in test.tree.calls if len(test.rows)]
    learnt = [level.call for level in levels if level.call in calls]
    report = Report(
        run.root,
        method,
        sum(p.numel() for p in trained.values()),
        levels,
        updates * len(levels),
        updates * stage + update,
        len(data.rows),
        main=main,
    )

    def measured(when: str, found: Measured, done: int = 0) -> None:
        run.save_evaluation(when, found)
        accelerator.log(tracking.metrics(when, found), step=done)

    if main:
        run.begin()
        run.cut_log(stage, update)
        tracking.start(accelerator, run, config, report.found)
        if on_start:
            on_start(
                (report.updates - report.found) * config.batch
                + test.targets.size
                * (len(learnt) + len(calls) * sum(when not in run.evaluation for when in ("before", "after")))
            )
        if calls and "before" not in run.evaluation:
            clean = load_trainable(config.reward, device)
            measured("before", evaluate(clean, test, calls, device=device, on_images=on_images))
    accelerator.wait_for_everyone()

    with run.log.open("a", encoding="utf-8") if main else nullcontext() as log:
        while stage < len(levels):
            level = levels[stage]
            shares = batches(
                data,
                config,
                stage=stage,
                call=level.call,
                first=update,
                process=accelerator.process_index,
                processes=accelerator.num_processes,
            )
            model.train()
            for parts in shares:
                rate = learning_rate(config, stage, update, updates)
                for group in adam.param_groups:
                    group["lr"] = rate
                # Dropout draws from torch's global generator: a seed per update makes a resumed run the same.
                torch.manual_seed(hash((config.seed, stage, update, accelerator.process_index)) % 2**63)
                sums = torch.zeros(2, device=device)
                for number, part in enumerate(parts):
                    images = torch.from_numpy(part.images).to(device).permute(0, 3, 1, 2).float() / 255
                    targets = torch.tensor(part.targets, device=device, dtype=torch.float32)
                    weights = torch.tensor(part.weights, device=device, dtype=torch.float32)
                    waiting = number < len(parts) - 1
                    with accelerator.no_sync(model) if waiting else nullcontext():
                        rewards = model(images, part.prompts, sigma=level.sigma).float()
                        if config.normalise:
                            rewards, targets = ((x - part.mean) / part.std for x in (rewards, targets))
                        mse = squared_error(rewards, targets, weights) / part.size
                        bradley_terry = torch.zeros_like(mse)
                        if config.pairs:
                            pairs = part.size / 2
                            bradley_terry = preference(rewards, targets, weights, config.temperature) / pairs
                        loss = config.mse * mse + config.preference * bradley_terry
                        # Processes average their gradients, and each has only its share of the sum.
                        accelerator.backward(loss * accelerator.num_processes)
                    sums += torch.stack([mse.detach(), bradley_terry.detach()])
                norm = accelerator.clip_grad_norm_(model.parameters(), config.clip or math.inf)
                optimiser.step()
                optimiser.zero_grad()

                mse_sum, preference_sum = accelerator.reduce(sums).tolist()
                loss_sum = config.mse * mse_sum + config.preference * preference_sum
                if not math.isfinite(loss_sum):
                    raise ValueError(
                        f"the loss is {loss_sum:g} at update {update + 1} of call {level.call}; "
                        "try a lower learning_rate or precision no"
                    )
                if log:
                    line = {
                        "stage": stage,
                        "call": level.call,
                        "update": update,
                        "loss": loss_sum,
                        "mse": mse_sum,
                        "preference": preference_sum if config.pairs else None,
                        "learning_rate": rate,
                        "gradient_norm": float(norm) if math.isfinite(float(norm)) else None,
                    }
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    accelerator.log(tracking.losses(line), step=updates * stage + update)
                    if on_images:
                        on_images(parts[0].size)
                update += 1
                if main and update % config.checkpoint_every == 0 and update < updates:
                    run.save_checkpoint(stage, update, trained, adam, accelerator.scaler)
                if log and on_update:
                    on_update(line)

            if main:
                if level.call in learnt:
                    model.eval()
                    judge = accelerator.unwrap_model(model)
                    during = evaluate(judge, test, [level.call], device=device, on_images=on_images)
                    measured("during", during, updates * (stage + 1))
                run.save_level(level, trained)
                run.save_checkpoint(stage + 1, 0, trained, adam, accelerator.scaler)
            accelerator.wait_for_everyone()
            stage, update = stage + 1, 0

    if main:
        if calls and ("after" not in run.evaluation or not finished):
            from ttsnap.rewards.noise_aware import load_noise_aware

            served = load_noise_aware(run.root, device)
            measured("after", evaluate(served, test, calls, device=device, on_images=on_images), report.updates)
        report.evaluation = run.evaluation
        run.draw(len(test.rows))
    accelerator.end_training()
    return report
