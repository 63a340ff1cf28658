"""Options that several verbs share: the groups of the help, and prompts and calls from text to values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from ttsnap.files.prompts import read_prompt_file, tidied, variants
from ttsnap.live.settings import ModelSettings, SearchSettings, read_numbers
from ttsnap.pipelines.conditions import Pictures

if TYPE_CHECKING:
    from ttsnap.cluster.scheduling import Pool
    from ttsnap.live.forecast import Work


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How many workers, and where; one without an address is this process.

    Attributes:
        workers: Worker processes, one per GPU, with the same results as one (needs the extra `cluster`).
        ray_address: Of a Ray cluster, such as auto or ray://host:10001.
    """

    workers: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")

    @property
    def alone(self) -> bool:
        """Whether this process does everything."""
        return self.ray_address is None and self.workers in (None, 1)

    def check_device(self, device: str | None, reward_device: str | None = None) -> None:
        """With several workers each takes the accelerator that Ray gives it."""
        for option, named in (("--device", device), ("--reward-device", reward_device)):
            if not self.alone and named not in (None, "cpu", "cuda", "mps"):
                raise ValueError(
                    f"with --workers each worker has a GPU of its own; {option} is cpu or cuda, got {named!r}"
                )

    def pool(self) -> Pool:
        """The workers."""
        from ttsnap.cluster.scheduling import ThisProcess

        if self.alone:
            return ThisProcess()
        from ttsnap.cluster.ray_pool import RayPool

        return RayPool(self.workers, self.ray_address)


def _group(name: str, order: int) -> Group:
    return Group(name, sort_key=order)


SEARCH, RECORDED, POLICIES, DATA = (_group(name, 1) for name in ("Search", "Recording", "Policies", "Data"))
COST, TRAINING, LABELS = (_group(name, 2) for name in ("Cost", "Training", "Published labels"))
MODEL, PICTURES, OFFER, SERVER = (_group(name, 3) for name in ("Model", "Pictures", "Offered", "Server"))
WORKERS, OUTPUT = _group("Many workers", 4), _group("Output", 5)

ModelOptions = Annotated[ModelSettings, Parameter(name="*", group=MODEL)]
SearchOptions = Annotated[SearchSettings, Parameter(name="*", group=SEARCH)]
PictureOptions = Annotated[Pictures, Parameter(name="*", group=PICTURES)]
WorkerOptions = Annotated[Workers, Parameter(name="*", group=WORKERS)]
AsJson = Annotated[bool, Parameter(group=OUTPUT, help="Print one JSON object on stdout and nothing else.")]
Budgets = Parameter(name=("--budgets", "--budget"), group=COST)
Accounting = Annotated[
    str, Parameter(group=COST, help="calls: everything counts; published: as the TTSnap authors charge.")
]
CostModelName = Annotated[
    str | None,
    Parameter(group=COST, help="flux-512, flux-512-counted, flux-1024, sdxl-512, sdxl-1024 (default: as recorded)."),
]
CallTflop = Annotated[float | None, Parameter(group=COST, help="Or: TFLOP of one call ...")]
LookTflop = Annotated[float | None, Parameter(group=COST, help="... and of one look, decode included.")]
Weights = Annotated[
    str | None, Parameter(group=POLICIES, help="Weights of several rewards, such as 1,.5 (default: rank sum).")
]

Rule = Annotated[
    str | None,
    Parameter(
        name="--combine",
        group=POLICIES,
        help='How several rewards become one: rank-sum, weighted-sum, minimum, or such as "hpsv2 where vqascore>=.8".',
    ),
]


DryRun = Annotated[
    bool,
    Parameter(
        name="--dry-run",
        negative="",
        group=OUTPUT,
        help="Only say what would run, and its calls, TFLOP, seconds, memory and disk.",
    ),
]


def tell(work: Work, as_json: bool) -> None:
    """Print what would run."""
    import json

    print(json.dumps(work.to_dict(), allow_nan=False) if as_json else work)


def read_prompts(
    given: Sequence[str],
    source: str | None,
    *,
    verb: str = "generate",
    column: str | None = None,
    wildcards: bool = False,
) -> list[str]:
    """Prompts of the command line, or of a file or built-in list.

    Args:
        given: on the command line.
        source: a file or list in their place.
        verb: that the example in the error message has.
        column: of a file that is a table, the one with the prompts.
        wildcards: put every prompt that `{a|b}` stands for in its place.
    """
    if column is not None and source is None:
        raise ValueError("--prompt-column belongs to --prompts with a table")
    if source is None:
        prompts = list(given)
    elif given:
        raise ValueError("give prompts on the command line or in a file, not both")
    elif (":" in source or not Path(source).suffix) and not Path(source).exists():
        lists = _lists()
        if source not in lists:
            raise ValueError(f"unknown prompts {source!r}; known are {', '.join(lists)}, or a file")
        prompts = lists[source]()
    else:
        prompts = read_prompt_file(Path(source), column)
    if wildcards:
        prompts = [variant for prompt in prompts for variant in variants(prompt)]
    if not prompts:
        raise ValueError(f'give a prompt, such as: ttsnap {verb} "a red circle left of a blue square"')
    return [tidied(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]


def _lists() -> dict[str, Callable[[], list[str]]]:
    """GenEval's prompts, and the lists that come with models, such as `shapes:train`."""
    from ttsnap.pipelines.models import MODELS
    from ttsnap.rewards.geneval_prompts import prompts as geneval

    return {"geneval": geneval} | {
        f"{name}:{kind}": read for name, model in MODELS.items() for kind, read in model.prompts.items()
    }


def read_range(text: str | None, count: int) -> range:
    """Part of `count` prompts: `0:400`, `:400` or `400:` (all if not given)."""
    if text is None:
        return range(count)
    first, colon, end = text.partition(":")
    if not colon or not all(part.isdigit() or not part for part in (first, end)):
        raise ValueError(f"--prompt-range takes first and end, such as 0:400, got {text!r}")
    chosen = range(int(first or 0), min(int(end or count), count))
    if not chosen:
        raise ValueError(f"--prompt-range {text} holds no prompt; there are {count}")
    return chosen


def read_calls(text: str | None, name: str = "--calls") -> list[int] | None:
    """Denoiser calls such as `1,5,20`."""
    if text is None:
        return None
    numbers = read_numbers(text, name, "1,5,20")
    if any(number != int(number) for number in numbers):
        raise ValueError(f"{name} takes whole numbers, such as 1,5,20, got {text!r}")
    return [int(number) for number in numbers]
