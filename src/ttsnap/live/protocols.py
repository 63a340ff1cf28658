"""Published comparisons as settings of `ttsnap bench`: what was compared, on what, at what cost, and what was printed.

What a paper does not say, or says of another sampler, is in `note`. A cost in images is that of so many without search,
by denoiser calls, whatever the number of steps; so a protocol can be tried on a small model, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ttsnap.rewards import parse

if TYPE_CHECKING:
    from ttsnap.live.leaderboard import Row

Settings = TypeVar("Settings")
BASE = "best-of-N"


@dataclass(frozen=True)
class Printed:
    """A figure that a paper prints.

    Attributes:
        method: as the paper calls it.
        policy: what it is called here; None: there is none.
        measure: the reward that is averaged over the chosen images, or whose perfect ones are counted.
        value: in the unit of the reward here (papers print HPSv2 times 100).
    """

    method: str
    policy: str | None
    measure: str
    value: float


@dataclass(frozen=True)
class Protocol:
    """A published comparison.

    Attributes:
        name: as `--protocol` takes it.
        source: the paper, by its present name.
        model: fields of the model's settings.
        compared: fields of the comparison's settings.
        prompts: a list that comes with ttsnap; None: give them.
        images: what a prompt may cost, in images without search; 0: `budget` says it.
        budget: the same with its unit.
        printed: what the paper prints.
        note: what is not said, or otherwise here.
    """

    name: str
    source: str
    model: Mapping[str, Any]
    compared: Mapping[str, Any]
    prompts: str | None
    images: int = 0
    budget: str = ""
    printed: tuple[Printed, ...] = field(default=(), repr=False)
    note: str = ""

    def budgets(self, steps: int | None) -> tuple[str, ...]:
        """What a prompt may cost, of a model that finishes an image in so many calls."""
        return (f"{self.images * (steps or self.model['steps'])}NFE",) if self.images else (self.budget,)

    def beside(self, rows: Sequence[Row]) -> list[str]:
        """What was printed beside what was measured, as lines of a table in Markdown."""
        lines = ["| method | here | of | printed | measured |", "|---" * 5 + "|"]
        for one in self.printed:
            found = next((row for row in rows if row.policy == one.policy), None)
            value = None if found is None else _measured(found, one.measure, rows)
            here = one.policy or "no such policy"
            measured = "-" if value is None else f"{value:.3f}"
            lines.append(f"| {one.method} | {here} | {one.measure} | {one.value:.3f} | {measured} |")
        return lines if self.printed else ["The paper's table is not at hand, so nothing is set beside these figures."]


def _measured(row: Row, measure: str, rows: Sequence[Row]) -> float | None:
    """What a row says of a reward: its mean, or the share of perfect images; None where it was not asked."""
    for name, value in row.held_out.items():
        if _clean(name) == measure:
            return value
    searched = row.reward or next((other.reward for other in rows if other.reward), None)
    return row.value if searched is not None and _clean(searched) == measure else None


def _clean(name: str) -> str | None:
    spec = parse(name)
    return name if spec is None else spec.clean


def filled(given: Settings, wanted: Mapping[str, Any]) -> Settings:
    """Settings with what a protocol wants in the place of all that was not given beside it."""
    unset = {f.name for f in fields(given) if getattr(given, f.name) == f.default}  # type: ignore[arg-type]
    return replace(given, **{name: value for name, value in wanted.items() if name in unset})  # type: ignore[type-var]


def _table(measures: str, rows: str, known: Mapping[str, str]) -> tuple[Printed, ...]:
    """Figures from a table whose lines are a method and one value per measure."""
    found = []
    for line in rows.split("\n"):
        method, *values = line.rsplit(maxsplit=len(measures.split()))
        pairs = zip(measures.split(), values, strict=True)
        found += [Printed(method, known.get(method), measure, float(value)) for measure, value in pairs]
    return tuple(found)


_PSP = "Progressive Seed Pruning (arXiv 2607.21591)"
_PSP_NAMES = {"best-of-4": BASE, "FK steering": "fk-max", "PSP": "psp"}
_PSP_NOTE = (
    "N = 4 at the cost of four images; the number of steps is the model's default in diffusers; BFS is a breadth-first "
    "search that is not among the policies; GenEval is checked by another detector (docs/rewards.md)"
)
_PSP_SEARCH = {
    "policies": "psp,fk-max",
    "reward": ("imagereward",),
    "report_reward": "hpsv2,geneval",
    "pool": 16,
}
_FLUX = "black-forest-labs/FLUX.1-dev"
_DOG = "Rethinking Test Time Scaling for Flow-Matching Generative Models (DOG-Trim; arXiv 2511.22242)"

PROTOCOLS = {
    one.name: one
    for one in (
        Protocol(
            "ttsnap",
            "TTSnap, the first version of arXiv 2511.22242, now: " + _DOG,
            {"model": _FLUX, "size": "512", "steps": 20},
            {"policies": "halving", "reward": ("hpsv2",), "pool": 40},
            None,
            budget="2000TFLOP",
            printed=_table("hpsv2", "best-of-10 .29106\nTTSnap .29301", {"best-of-10": BASE, "TTSnap": "halving"}),
            note=(
                "prompts are the first 200 of the authors' dataset_prompts_validation.json; TTSnap is guided by their "
                "noise-aware checkpoints: --reward hpsv2+DIR; their accounting charges one call less per candidate, so "
                "they start 38 candidates where every call counted pays for 32 (`ttsnap simulate --accounting "
                "published` reproduces it on their recorded rewards)"
            ),
        ),
        Protocol(
            "psp",
            _PSP,
            {"model": "stabilityai/stable-diffusion-xl-base-1.0", "steps": 50},
            _PSP_SEARCH,
            "geneval",
            images=4,
            printed=_table(
                "imagereward hpsv2 geneval",
                "best-of-4 1.098 .290 .629\nFK steering 1.189 .284 .627\nBFS 1.247 .285 .636\nPSP 1.224 .294 .645",
                _PSP_NAMES,
            ),
            note=_PSP_NOTE,
        ),
        Protocol(
            "psp-sd3.5",
            _PSP,
            {"model": "stabilityai/stable-diffusion-3.5-medium", "steps": 28},
            _PSP_SEARCH,
            "geneval",
            images=4,
            printed=_table("imagereward geneval", "best-of-4 1.336 .747\nPSP 1.380 .747", _PSP_NAMES),
            note=_PSP_NOTE + "; which of the SD3.5 models is not known here",
        ),
        Protocol(
            "dog-trim",
            _DOG,
            {"model": _FLUX, "size": "512", "steps": 35},
            {
                "policies": "zero-order,epsilon-greedy,search-over-paths,trajectory-greedy,early-selection,smc,fk-max,"
                "halving,dog-trim",
                "reward": ("hpsv2",),
                "report_reward": "imagereward,pickscore",
                "pool": 24,
            },
            None,
            images=6,
            note=(
                "best-of-6 and nine searches at its cost; prompts are those of the authors' hpd_test.json; their "
                "trimming is `dog-trim` with noise-aware checkpoints, --reward hpsv2+DIR, and their repulsion of "
                "tokens is --diversity (docs/diversity.md)"
            ),
        ),
        Protocol(
            "rbf",
            "Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing "
            "(arXiv 2503.19385)",
            {"model": "black-forest-labs/FLUX.1-schnell", "size": "1024", "steps": 10},
            {
                "policies": "search-over-paths,smc,svdd,rbf",
                "reward": ("vqascore",),
                "report_reward": "aesthetic",
                "pool": 64,
            },
            None,
            budget="500NFE",
            printed=_table("vqascore", "one image .788\nRBF .925", {"RBF": "rbf"}),
            note=(
                "500 calls are 50 images of 10 steps; prompts are compositional ones of GenAI-Bench; the authors draw "
                "each step from an SDE, here noise is rotated (docs/searches.md)"
            ),
        ),
    )
}


def named(name: str) -> Protocol:
    """A protocol by its name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; known are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
