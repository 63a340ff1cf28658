"""Live search: from a pipeline, prompts and a budget to results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ttsnap import policies, rewards
from ttsnap.core.cost import Budget, affordable
from ttsnap.core.grid import Combine, IntArray, Policy
from ttsnap.core.observers import Observer
from ttsnap.core.ranking import Minimum, WeightedSum, read_rule
from ttsnap.live import reporting
from ttsnap.live.interactive import Shown, Stream, bar
from ttsnap.live.judging import EACH, deal, try_own
from ttsnap.live.open_search import OpenSearch, Setup, check_top
from ttsnap.live.result import SearchResult
from ttsnap.pipelines.additions import Additions
from ttsnap.pipelines.conditions import Pictures
from ttsnap.pipelines.loading import Loading, check_model, find_device, load, read_devices, warm_up
from ttsnap.pipelines.models import MODELS, model_name
from ttsnap.pipelines.schedulers import check_fits, check_scheduler, with_scheduler
from ttsnap.pipelines.single_file import Loaded
from ttsnap.pipelines.sizes import rounded, sized
from ttsnap.policies import SuccessiveHalving, UntilGood, default_policy, tuned_policy

if TYPE_CHECKING:
    import torch

    from ttsnap.pipelines.negtome import Negtome
    from ttsnap.pipelines.sampler import Preview, Sampler

DEFAULT_CANDIDATES = 32  # with the published schedule about 2000 TFLOP on FLUX at 512 x 512, as in the paper
MARGIN = 1.08  # searches are planned to take this much longer than calibrated, so that a budget in seconds is kept to


def reward_of(model: str, reward: rewards.Rewards | None, *, pushed: bool = False) -> rewards.Rewards:
    """The reward that is asked for, else the model's own.

    Args:
        model: its name.
        reward: that is asked for.
        pushed: candidates are pushed apart, which leaves no features to read.

    Raises:
        ValueError: neither is there.
    """
    if reward is None and (own := MODELS.get(model)):
        reward = own.pushed_reward if pushed and own.pushed_reward else own.reward
    if reward is None:
        raise ValueError(f"name a reward; known are {', '.join(rewards.REWARDS)}")
    return reward


def load_sampler(
    pipe: Any,
    device: str | None = None,
    dtype: str | None = None,
    prompt: str = "a",
    diversity: Negtome | None = None,
    preview: str | Preview | None = None,
    cache: str | None = None,
    draft_cache: str | None = None,
    devices: str | Sequence[str] | None = None,
    **options: Any,
) -> Sampler:
    """The sampler of a model, which is loaded where it is named.

    Args:
        pipe: a stock pipeline, `shapes`, a diffusers directory, a .safetensors file, or a hub id.
        device: where a model that is named runs.
        dtype: its dtype.
        prompt: one that the pipeline takes.
        diversity: push the candidates of a prompt apart (FLUX, SDXL, Stable Diffusion).
        preview: what early looks judge: `full` (default), `tiny[=DIR]`, `small[=PIXELS]`, `linear` or `auto` (see
            `ttsnap.pipelines.previews`); finished images always use the full decoder.
        cache: let denoiser calls do without a part of their work, such as `FirstBlock,threshold=.1` (see
            `ttsnap.pipelines.caches`).
        draft_cache: the same, for candidates on their way to a look; those that are finished are begun again without.
        devices: several devices that work for one search, the model's own first, such as `0,1,2,3` or `cpu,cpu`.
        **options: the pipeline's own arguments, by its own names; `max_batch` and `look_frames` of the sampler, and
            those of `ttsnap.pipelines.loading.Loading` for a model that is named; pictures by their files are
            given to the pipeline, or to its variant that takes them: `image`, `mask_image`, `strength`, `control`,
            `ip_adapter` and so on, or all of them as `pictures` (a `ttsnap.pipelines.conditions.Pictures`);
            `aspect_ratio`, such as `3:2`, in place of height and width, at the model's own area; `scheduler` is one in
            place of the pipeline's own, see `ttsnap.pipelines.schedulers`.

    Raises:
        ValueError: no such model, device, dtype or option value.
    """
    from ttsnap.pipelines import caches, previews

    if isinstance(preview, str):
        previews.parse(preview)  # complains here, before a model is loaded
    if reused := cache or draft_cache:
        caches.read_cache(reused)
        others = {"diversity": diversity, "compile": options.get("compile"), "several devices": devices}
        others["a draft cache"] = cache and draft_cache
        if wrong := [name for name, value in others.items() if value]:
            raise ValueError(f"a cache does not go with {wrong[0]}; leave one of them out")
    name = model_name(pipe)
    places = read_devices(devices) if devices is not None else []
    loads = {field.name for field in fields(Loading)} & options.keys()
    given = {key: value for key in loads if (value := options.pop(key)) is not None}
    scheduler = options.pop("scheduler", None)
    if scheduler:
        check_scheduler(scheduler)
    pictures = options.pop("pictures", None) or Pictures.taken_from(options)
    pictures.settings()  # complains here about files that cannot be read
    if isinstance(pipe, str):
        if scheduler:
            check_fits(str(MODELS[pipe].weights) if pipe in MODELS else pipe, scheduler)
        loading = Loading(device=places[0] if places else device, dtype=dtype, **given)
        loaded = load(pipe, loading, pictures)
    else:
        loading, loaded = Loading(), Loaded(pipe)
        if unfit := [key for key, value in given.items() if value != getattr(loading, key)]:
            raise ValueError(f"{', '.join(unfit)} is for a model that is named; a pipeline is used as it is")
        if pictures.ip_adapter:
            raise ValueError(
                "ip_adapter is for a model that is named; load it with the pipeline's own load_ip_adapter, and give "
                "ip_adapter_image"
            )
        pictures.dress(loaded)
    pipe, lines, notes = loaded.pipe, loaded.lines, loaded.notes
    if scheduler:
        pipe, line = with_scheduler(pipe, scheduler)
        lines = [*lines, line]
    if name in MODELS:
        options = {**MODELS[name].arguments, **options}
    if ratio := options.pop("aspect_ratio", None):
        options |= sized(pipe, ratio, options)
    if pictures:
        options = pictures.arguments(pipe, options)
    sampler = sampler_of(pipe, prompt, options)
    sampler.prelude = "; ".join(lines)
    for note in notes:
        sampler.note(note)
    if loading.compile:
        warm_up(sampler)
    if diversity:
        from ttsnap.pipelines.negtome import attach

        attach(sampler, diversity)
    if reused:
        caches.attach(sampler, reused, drafts=bool(draft_cache))
    previews.attach(sampler, preview)
    if places:
        from ttsnap.pipelines.replicas import Replicas

        sampler.replicas = Replicas(sampler, places)
    return sampler


def sampler_of(pipe: Any, prompt: str, options: dict[str, Any]) -> Sampler:
    """A sampler; of a size that the pipeline refuses the nearest that it takes, with a note."""
    from ttsnap.pipelines.sampler import Sampler

    try:
        return Sampler(pipe, example=prompt, **options)
    except ValueError as error:
        if (nearest := rounded(error, options)) is None:
            raise
        sampler = Sampler(pipe, example=prompt, **options | nearest)
    sides = (" x ".join(str(size[side]) for side in ("width", "height") if side in size) for size in (nearest, options))
    made, asked = sides
    sampler.note(f"{type(pipe).__name__} makes no images of {asked}; these are of {made}, the nearest that it makes")
    return sampler


@dataclass
class Session(Setup):
    """Everything a search needs, prepared once and used for any number of prompts; see `Setup` for its attributes.

    As a context manager it is closed in the end: `with ttsnap.prepare(...) as session:`.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model and the rewards, so that their memory is free where nobody else holds them."""
        import gc

        import torch

        if self.sampler is not None and self.sampler.replicas is not None:
            self.sampler.replicas.close()
        self.sampler, self.judges, self.held_out = None, {}, {}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def search(self, prompt: str, *, num_inference_steps: int | None = None, **options: Any) -> SearchResult:
        """Search for one prompt; options are those of `block`, and another number of steps."""
        if num_inference_steps not in (None, self.sampler and self.sampler.num_steps):
            return self.with_steps(int(num_inference_steps or 0)).block([prompt], **options)[0]
        return self.block([prompt], **options)[0]

    def block(
        self,
        prompts: Sequence[str],
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        top: int = 1,
        compare: bool | Sequence[int] = False,
        previews: bool = True,
        observer: Observer | None = None,
        place: int = 0,
        progress: bool | None = None,
    ) -> list[SearchResult]:
        """Search for several prompts together, so that batches stay full.

        Args:
            prompts: the prompts; each gets the candidates `seed`, `seed` + 1, ...
            seed: first seed (default: 0).
            generator: or, as the stock call takes it, a generator; the seed that it was given is the first seed.
            top: how many of the best finished images to return.
            compare: also run best-of-N at the same cost, on the first of the same seeds; or the numbers of steps to
                run it with, beside the search's own (default: the model's own, and that at which best-of-N is best,
                where they are known).
            previews: keep small pictures of every look, for the pruning board.
            observer: is told what happens, and may raise `ttsnap.core.observers.Stop`.
            progress: show a bar (default: in notebooks).
            place: of the first prompt among all that there are, where these are a part: a policy's randomness depends
                on it.
        """
        check_top(top)
        block = self.open(prompts, seed=first_seed(seed, generator), previews=previews, place=place)
        shown = Shown(observer, progress)
        try:
            block.run(shown)
        finally:
            shown.close()
        if compare:
            block.compare(observer, _steps(compare))
        return block.results(top)

    def open(self, prompts: Sequence[str], *, seed: int = 0, previews: bool = True, place: int = 0) -> OpenSearch:
        """The same, step by step: to finish dropped candidates after all, or compare, once the policy has ended."""
        seeds = self._seeds(prompts, seed)
        return OpenSearch(self, self.engine().grid(prompts, seeds, previews=previews), place=place)

    def stream(
        self,
        prompts: Sequence[str],
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        top: int = 1,
        compare: bool | Sequence[int] = False,
        previews: bool = True,
        observers: Callable[[int], Observer] | None = None,
        places: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> Stream[tuple[int, SearchResult | Exception]]:
        """Search for many prompts; candidates of the next fill the places of those that were dropped.

        Each prompt gets the choice and the ledger that it gets alone. Arguments are those of `block`; `observers`
        answers with who is told of the prompt of that index (asked, looked and ended only); `places` are those of the
        prompts among all that there are, where these are a part: a policy's randomness depends on them.

        Returns:
            Index of a prompt and its result, or why it failed, in the order in which they end; for `for` and for
            `async for`.
        """
        check_top(top)
        first = first_seed(seed, generator)
        return Stream(self._stream(prompts, first, top, compare, previews, observers, places, progress))

    def _stream(
        self,
        prompts: Sequence[str],
        seed: int,
        top: int,
        compare: bool | Sequence[int],
        previews: bool,
        observers: Callable[[int], Observer] | None,
        places: Sequence[int] | None,
        progress: bool | None,
    ) -> Iterator[tuple[int, SearchResult | Exception]]:
        """What `stream` yields."""
        seeds = self._seeds(prompts, seed)
        shown = bar(progress, total=len(prompts), unit="prompt", leave=False)
        ends = self.engine().stream(
            prompts,
            seeds,
            self.policy,
            self.combine,
            seed=seed,
            places=places,
            previews=previews,
            observers=observers,
            different=bool(self.different),
        )
        for ended in ends:
            if shown is not None:
                shown.update()
            if ended.result is None:
                assert ended.error is not None
                yield ended.number, ended.error
                continue
            try:
                place = ended.number if places is None else places[ended.number]
                block = OpenSearch(self, ended.grid, ended.result, ended.seconds, ended.notes, place)
                if compare:
                    block.compare(steps=_steps(compare))
                results = block.results(top)
            except Exception as error:
                yield ended.number, error
            else:
                yield ended.number, results[0]
        if shown is not None:
            shown.close()
        self.sampler.forget_prompts()

    def block_size(self) -> int:
        """Prompts that run together, the same wherever they run: enough that batches are full."""
        from ttsnap.live.engine import prompts_per_block

        return prompts_per_block(self.policy.plan(self.candidates, self.sampler.num_steps), self.sampler.max_batch)

    def _seeds(self, prompts: Sequence[str], seed: int) -> IntArray:
        """Seeds [prompts, candidates]; complains about prompts that cannot be searched for."""
        check_prompts(prompts)
        if self.sampler is None:
            raise ValueError("the session is closed; prepare another one")
        return np.broadcast_to(seed + np.arange(self.candidates), (len(prompts), self.candidates))


def prepare(
    pipe: Any,
    *,
    reward: rewards.Rewards | None = None,
    budget: str | Budget | None = None,
    candidates: int | None = None,
    policy: str | Policy | None = None,
    stop_at: float | None = None,
    different: int = 0,
    combine: Combine | str | None = None,
    weights: Sequence[float] | None = None,
    report: rewards.Rewards | None = reporting.AUTO,
    prompt: str = "a",
    device: str | None = None,
    dtype: str | None = None,
    reward_device: str | None = None,
    reward_timeout: float | None = None,
    diversity: Negtome | None = None,
    **options: Any,
) -> Session:
    """Load and count everything a search needs.

    Args:
        pipe: a stock pipeline, `shapes`, a diffusers directory, a .safetensors file, or a hub id.
        reward: name, several names, a callable, or name -> callable (default: the model's own).
        budget: what a prompt may cost: `200NFE`, `2000TFLOP`, `30s`; where a model's schedule, or the policy file, was
            tuned for several budgets, it chooses policy and number of steps; or
        candidates: how many to start (default 32; 8 for `shapes`).
        policy: a policy, its name, or a policy file (default: the schedule tuned for the model if one ships, else
            successive halving).
        stop_at: reward that is good enough: candidates are searched four at a time, until a finished one has it.
        different: choose so many images that are good and different, while candidates are pruned and at the end.
        combine: several rewards -> one number: `rank-sum` (default), `weighted-sum` (default with weights), `minimum`,
            such as `hpsv2 where vqascore>=.8`, or a callable (see `ttsnap.core.ranking`).
        weights: of several rewards.
        report: rewards that judge the finished images and steer nothing; `auto`: one that is at hand without a
            download, if there is one; `none`; see `ttsnap.live.reporting`.
        prompt: a prompt to count and calibrate with.
        device: where a model that is named runs.
        dtype: its dtype.
        reward_device: where rewards that are named run, such as `cuda:1` (default: with the model); pictures go there.
            `each`: on each of `devices`, which share the pictures.
        reward_timeout: seconds in which a reward has to answer about a batch (default: it may take for ever).
        diversity: push the candidates of a prompt apart (FLUX, SDXL, Stable Diffusion).
        **options: the pipeline's own arguments, by its own names (num_inference_steps, guidance_scale, image ...);
            `preview` (default: `auto`), `devices`, `max_batch`, `look_frames` and `pictures`, see `load_sampler`; and,
            for a model that is named, those of `ttsnap.pipelines.loading.Loading` (offload, compile, vae_slicing ...).

    Raises:
        ValueError: what was wrong and what would work.
    """
    if budget is not None and candidates is not None:
        raise ValueError("give a budget or a number of candidates, not both")
    if candidates is not None and (isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1):
        raise ValueError(f"candidates must be a whole number of at least 1, got {candidates!r}")
    if isinstance(budget, str):
        budget = Budget.parse(budget)
    if budget is not None and not isinstance(budget, Budget):
        raise ValueError(f"a budget is a text such as '200NFE', '2000TFLOP' or '30s', got {budget!r}")
    if isinstance(pipe, str):
        check_model(pipe)
    name = model_name(pipe)
    own = MODELS.get(name)
    reward = reward_of(name, reward, pushed=bool(diversity))
    names = rewards.names_of(reward)
    if isinstance(combine, WeightedSum) and len(combine.weights) != len(names):
        raise ValueError(f"{len(names)} rewards need as many weights, got {len(combine.weights)}")
    if combine is None or isinstance(combine, str):
        combine = read_rule(combine, names, weights)
    elif weights is not None:
        raise ValueError("give weights, or a callable that combines the rewards, not both")
    one_number = isinstance(combine, WeightedSum) or (isinstance(combine, Minimum) and combine.weights)
    if stop_at is not None and len(names) > 1 and not one_number:
        raise ValueError("a reward to stop at needs one reward, or weights that make several one number")
    second = reporting.second_reward(name, names) if report == reporting.AUTO else None
    if report in (reporting.AUTO, reporting.NONE):
        report = None
    if report is not None and (both := set(rewards.names_of(report)) & set(names)):
        raise ValueError(f"the reward {min(both)} cannot be both optimised and held out")
    options["pictures"] = options.get("pictures") or Pictures.taken_from(options)
    options["pictures"].settings()  # their files are read now, and may be gone when the search ends
    chosen, tuned = None if isinstance(policy, str) else policy, None
    if isinstance(policy, str):
        chosen, steps = policies.read(policy, budget)
        options = ({"num_inference_steps": steps} if steps else {}) | options
    elif policy is None and not options["pictures"]:
        tuned = tuned_policy(name, names, options.get("num_inference_steps"), budget)
    if tuned:
        chosen, options["num_inference_steps"] = tuned
    given = {**(own.arguments if own else {}), **options}
    size = (given["height"], given["width"]) if given.get("height") and given.get("width") else None
    each = reward_device == EACH
    placed = find_device(reward_device) if reward_device is not None and not each else None
    if each and (reward_timeout or not options.get("devices") or not isinstance(reward, str | Sequence)):
        raise ValueError(
            f"--reward-device {EACH} is for rewards by name in a search on several devices (--devices), without "
            "--reward-timeout"
        )
    for named in [reward] if report is None else [reward, report]:
        try_own(named, prompt, size, reward_timeout)
    asked = {"reward": reward, "preview": options.get("preview"), "scheduler": options.get("scheduler")}
    asked |= {
        "cache": options.get("cache"),
        "draft_cache": options.get("draft_cache"),
        "attention": options.get("attention"),
        "dtype": dtype,
        "config": options.get("config"),
        "quantize": options.get("quantize"),
    }
    asked |= {field.name: options.get(field.name) for field in fields(Additions)}
    preview = options.pop("preview", None) or "auto"
    automatic = preview == "auto"
    sampler = load_sampler(pipe, device, dtype, prompt, diversity, "full" if automatic else preview, **options)
    from ttsnap.live.calibration import calibrate
    from ttsnap.pipelines import features, previews
    from ttsnap.pipelines.flops import cost_model, count_look

    if tuned and sampler.num_steps != tuned[1]:  # a scheduler that takes more steps than it is told
        chosen = None
    chosen = chosen or default_policy(sampler.num_steps)
    if different and isinstance(chosen, SuccessiveHalving):
        chosen = replace(chosen, least=max(chosen.least, different))
    if stop_at is not None:
        chosen = UntilGood(stop_at, inner=chosen)
    chosen.plan(2, sampler.num_steps)  # complains here about rungs beyond the steps
    place = placed or sampler.device
    judges = rewards.load(reward, place, reward_timeout)
    held_out = rewards.load(report, place, reward_timeout) if report is not None else {}
    features.attach(sampler, judges)  # complains here where features cannot be read
    if sampler.cache and sampler.tap:
        raise ValueError(
            "a reward that reads what the denoiser knows needs whole calls; leave out the cache, or take another reward"
        )
    if automatic and not any(trained_on_decodes(judge) for judge in judges.values()):
        previews.attach(sampler, "auto")
    model = cost_model(sampler, judges, prompt)
    if budget is not None:
        if budget.unit == "s":
            model = calibrate(sampler, judges, model, prompt)
        candidates = affordable(chosen, budget, model.slower(MARGIN), sampler.num_steps)
    if each:
        assert isinstance(reward, str | Sequence)
        assert sampler.replicas is not None
        judges = deal(judges, rewards.split(reward), sampler.replicas)
    candidates = candidates or (own and own.candidates) or DEFAULT_CANDIDATES
    if different and (ends := chosen.plan(candidates, sampler.num_steps)[-1].size) < different:
        raise ValueError(
            f"with {candidates} candidates this policy finishes {ends}, fewer than the {different} that are to differ; "
            "take halving or best-of-n, and as many candidates"
        )
    assert list(judges) == names
    fixed = diversity or options["pictures"] or {"sigmas", "timesteps"} & options.keys()  # the number of steps is
    return Session(
        sampler,
        judges,
        chosen,
        candidates,
        model,
        name,
        str(budget) if budget else None,
        combine,
        different,
        held_out,
        {name: count_look(judge, sampler.device, sampler.height, sampler.width) for name, judge in held_out.items()},
        second,
        {name: value for name, value in asked.items() if value and isinstance(value, str | list | tuple)}
        | {"pictures": options["pictures"]},
        () if fixed else policies.baseline_steps(name, rewards.targets_of(judges), policy),
    )


def _steps(compare: bool | Sequence[int]) -> Sequence[int]:
    """Numbers of steps that are given in the place of a flag."""
    return () if isinstance(compare, bool) else tuple(compare)


def trained_on_decodes(judge: Any) -> bool:
    """Whether a reward was made noise-aware on decoded x0 estimates, so that other pictures are new to it."""
    return hasattr(judge, "level") and getattr(judge, "place", None) is None


def search(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    top: int = 1,
    compare: bool | Sequence[int] = False,
    observer: Observer | None = None,
    progress: bool | None = None,
    **settings: Any,
) -> SearchResult | list[SearchResult]:
    """Find the best image for a prompt under a compute budget.

    To search again and again, prepare once with `ttsnap.prepare`.

    Args:
        pipe: a stock diffusers pipeline, `shapes`, a diffusers directory, a .safetensors file, or a hub id.
        prompt: what to paint, or a list of prompts, which share batches.
        seed: first seed; candidates use `seed`, `seed` + 1, ... (default: 0).
        generator: or, as the stock call takes it, a generator; the seed that it was given is the first seed. Noise is
            drawn on the CPU, wherever the generator is.
        top: how many of the best finished images to return; with `different=True` those that are also different.
        compare: also run best-of-N at the same cost, on the first of the same seeds; or the numbers of steps to run it
            with, beside the search's own (default: the model's own, and that at which best-of-N is best, where they
            are known).
        observer: is told what happens, and may raise `ttsnap.core.observers.Stop`: what is finished by then is kept.
        progress: show a bar (default: in notebooks).
        **settings: those of `prepare` (`reward`, `budget` or `candidates`, `policy`, `preview`, `device`, `dtype` ...),
            and all that the pipeline's own call takes, by its own names: `num_inference_steps`, `guidance_scale`,
            `negative_prompt`, `image`, `callback_on_step_end` ...

    Returns:
        The image, its reward and seed, the cost, and the history of every candidate; of a list of prompts, a list.

    Raises:
        ValueError: what was wrong and what would work.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    check_prompts(prompts)
    check_top(top)
    first = first_seed(seed, generator)
    if settings.get("different") is True:
        settings["different"] = top
    session = prepare(pipe, prompt=prompts[0], **settings)
    results = session.block(prompts, seed=first, top=top, compare=compare, observer=observer, progress=progress)
    return results[0] if isinstance(prompt, str) else results


def first_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """The first seed that a number or a generator says; 0 without either.

    Raises:
        ValueError: both are given, or several generators.
    """
    if generator is None:
        return seed or 0
    if seed is not None:
        raise ValueError("give a seed or a generator, not both")
    if not hasattr(generator, "initial_seed"):
        raise ValueError(
            f"generator is one torch.Generator, whose seed the first candidate has, got {type(generator).__name__}"
        )
    return int(generator.initial_seed())


def check_prompts(prompts: Sequence[str]) -> None:
    """ValueError about prompts that cannot be searched for."""
    if not prompts:
        raise ValueError("a search needs at least one prompt")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is a text, got {type(prompt).__name__} {prompt!r}")
        if not prompt.strip():
            raise ValueError("a prompt is empty; it needs at least one word")
