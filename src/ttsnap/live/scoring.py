"""Scoring pictures that are there already: files are read ahead, rewards judge in full batches.

What a reward said of a picture is kept in a journal as soon as it is known, by the content of the file, the prompt and
the reward with its weights or code. So a run that was killed goes on where it was, a file, a prompt or a reward that
has changed is judged again, and one more reward leaves the others as they are.
"""

from __future__ import annotations

import csv
import io
import json
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ttsnap import rewards
from ttsnap.core.ranking import Rule, order, read_rule
from ttsnap.files.finding import find_pictures
from ttsnap.files.journal import Journal, read_lines
from ttsnap.files.prompts import tidied
from ttsnap.files.readers import Item, Read, Reading
from ttsnap.live.judging import apart, judge_in_parts, try_own
from ttsnap.live.settings import check_ranges, read_weights, reward_contents
from ttsnap.pipelines.patience import Timed, check_timeout

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ttsnap.files.finding import Found

JOURNAL = "scores.jsonl"
MOST_PIXELS = 64_000_000  # of a batch of whole pictures
MOST_WAITING = 1 << 30  # bytes of pictures that wait until a batch is full


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What judges pictures, and how.

    Attributes:
        reward: Reward (see `ttsnap rewards`), module:function, or several by commas.
        weights: Weights of several rewards, such as 1,.5 (default: rank sum).
        combine: How several rewards rank: rank-sum, weighted-sum, minimum, or such as "hpsv2 where vqascore>=.8".
        prompt: What all the pictures are to show (default: what a table or the picture's own metadata says).
        sigma: Noise level of the pictures, for noise-aware rewards (default: 0, finished pictures).
        max_batch: Most pictures in one batch (halved when memory runs out).
        readers: Processes that read and decode (default: one per core but one, at most 8).
        device: cpu, cuda, cuda:1, mps.
        reward_timeout: Seconds in which a reward has to answer about a batch (default: it may take for ever).
    """

    reward: str | None = None
    weights: str | None = None
    combine: str | None = None
    prompt: str | None = None
    sigma: float = 0.0
    max_batch: int = 32
    readers: int | None = None
    device: str | None = None
    reward_timeout: float | None = None

    def __post_init__(self) -> None:
        check_timeout(self.reward_timeout)
        check_ranges(max_batch=(self.max_batch, 1, 4096), readers=(self.readers, 1, 256))
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"--sigma is a noise level of at least 0, got {self.sigma:g}")
        if self.prompt is not None:
            tidied(self.prompt, "--prompt")
        if self.reward is not None:
            self.rule(rewards.names_of(self.reward))

    def rule(self, names: Sequence[str]) -> Rule:
        """How rewards with these names rank."""
        return read_rule(self.combine, names, read_weights(self.weights))


@dataclass(frozen=True)
class Scored:
    """A picture and what rewards say of it.

    Attributes:
        name: of its file, or its number.
        prompt: it was judged for.
        rewards: by name.
        note: what else is in its file and was not judged.
        fault: why a reward is missing; empty if none is.
        path: of its file.
    """

    name: str
    prompt: str = ""
    rewards: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    fault: str = ""
    path: Path | None = None


@dataclass(frozen=True)
class Scores:
    """Pictures with their rewards.

    Attributes:
        rewards: names.
        pictures: the best first (of several rewards, as `combine` says); then those with a fault.
        found: how many of them were in the journal already.
        left_out: files of folders that are no pictures.
    """

    rewards: list[str]
    pictures: list[Scored]
    found: int = 0
    left_out: list[str] = field(default_factory=list)

    @property
    def ranked(self) -> list[Scored]:
        """Those with all rewards, the best first."""
        return [picture for picture in self.pictures if not picture.fault]

    @property
    def faulty(self) -> list[Scored]:
        """Those that lack one."""
        return [picture for picture in self.pictures if picture.fault]

    @property
    def best(self) -> Scored:
        """The best picture.

        Raises:
            ValueError: none could be scored; says why.
        """
        if not self.ranked:
            raise ValueError(f"no picture could be scored: {self.pictures[0].name} {self.pictures[0].fault}")
        return self.ranked[0]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "rewards": self.rewards,
            "pictures": [
                {
                    "rank": place,
                    "file": picture.name,
                    "prompt": picture.prompt,
                    "rewards": dict(picture.rewards),
                    "note": picture.note,
                }
                for place, picture in enumerate(self.ranked, 1)
            ],
            "faults": [
                {"file": p.name, "fault": p.fault, "prompt": p.prompt, "rewards": dict(p.rewards)} for p in self.faulty
            ],
            "left_out": self.left_out,
            "found": self.found,
        }


def score(
    pictures: str | Path | Image | Sequence[str | Path | Image] | Found,
    *,
    reward: rewards.Rewards | None = None,
    prompt: str | Sequence[str] | Mapping[str, str] | None = None,
    out: str | Path | None = None,
    on_start: Callable[[int], None] | None = None,
    on_images: Callable[[int], None] | None = None,
    **settings: Any,
) -> Scores:
    """Judge pictures by rewards.

    Args:
        pictures: a folder, a pattern, a table (.csv, .tsv, .jsonl with columns `file` and perhaps `prompt`), a file, a
            PIL picture, or several of these.
        reward: name, several names, a callable, or name -> callable.
        prompt: of all pictures; one per picture; or by file, as the path or the name says it. Default: what the table
            or the picture's metadata says.
        out: a folder for the journal; a run that was stopped goes on from it.
        on_start: called with the number of pictures.
        on_images: called with the number of pictures that are done.
        **settings: `weights`, `combine`, `sigma`, `max_batch`, `readers`, `device`; see `ScoreSettings`.

    Raises:
        ValueError: what was wrong and what would work. A picture that cannot be judged is no error, but has a `fault`.
    """
    asked = ScoreSettings(**settings)
    if reward is None:
        raise ValueError(f"name a reward; known are {', '.join(rewards.REWARDS)}")
    names = rewards.names_of(reward)
    asked.rule(names)
    items, left_out = _items(pictures, prompt)
    try_own(reward, "a", None, asked.reward_timeout)
    keys = _reward_keys(reward, names, asked.sigma)
    from ttsnap.pipelines.loading import find_device

    device = find_device(asked.device)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module="PIL")  # on files that are said to be damaged, or shown all the same
        journal, known = None, {}
        if out is not None:
            Path(out).mkdir(parents=True, exist_ok=True)
            known = {line["key"]: line for line in read_lines(Path(out) / JOURNAL) if "key" in line}
            journal = stack.enter_context(Journal(Path(out) / JOURNAL))
        reading = stack.enter_context(Reading(keys, set(known)).begin(items, asked.readers))
        judges = rewards.load(reward, device, asked.reward_timeout)  # while the first pictures are read
        if on_start:
            on_start(len(items))
        work = _Work(items, judges, asked, device, known, journal, on_images)
        return work.run(reading, left_out)


class _Row(NamedTuple):
    """A picture that waits for a reward: number of its item, pixels [3, h, w], prompt, and key of its line."""

    item: int
    pixels: np.ndarray
    prompt: str
    key: str


@dataclass
class _Work:
    """One run: pictures on their way through the rewards."""

    items: Sequence[Item]
    judges: Mapping[str, Any]
    settings: ScoreSettings
    device: Any
    known: Mapping[str, Mapping[str, Any]]
    journal: Journal | None
    on_images: Callable[[int], None] | None

    def __post_init__(self) -> None:
        from ttsnap.pipelines.limits import Limits

        self.limits = Limits(self.settings.max_batch)
        self.prompted = any(getattr(judge, "reads_prompt", True) for judge in self.judges.values())
        self.values: list[dict[str, float]] = [{} for _ in self.items]
        self.faults: list[str] = ["" for _ in self.items]
        self.told: list[tuple[str, str]] = [("", "") for _ in self.items]  # prompt and note
        self.waiting: dict[str, dict[tuple[int, ...], list[_Row]]] = {name: {} for name in self.judges}
        self.left = [len(self.judges) for _ in self.items]  # rewards that have not judged it yet
        self.bytes = 0  # of pictures that wait
        self.found = 0

    def run(self, reading: Iterable[Read], left_out: list[str]) -> Scores:
        """Judge all."""
        for number, read in enumerate(reading):
            self._take(number, read)
        for name in self.judges:
            while self.waiting[name]:
                self._judge(name, self._some(name))
        return self._scores(left_out)

    def _take(self, number: int, read: Read) -> None:
        """Let a picture that was read wait until a batch is full."""
        lacks = self.prompted and read.pixels is not None and read.prompt is None
        fault = "has no prompt in its metadata; give --prompt, or --prompts with a file" if lacks else read.fault
        if fault:
            self.faults[number] = fault
            self._done([number] * len(self.judges))
            return
        known = {name: self.known[key] for name, key in read.keys.items() if key in self.known}
        for name, line in known.items():
            self.values[number][name] = float(line["value"])
            self.told[number] = line["prompt"], line["note"]
        self.found += len(known) == len(read.keys)
        self._done([number] * len(known))
        if read.pixels is None:
            return
        pixels = np.frombuffer(read.pixels, np.uint8).reshape(3, *reversed(read.size))
        self.told[number] = read.prompt or "", read.note
        for name in read.keys.keys() - known.keys():
            groups = self.waiting[name]
            group = groups.setdefault(pixels.shape, [])
            group.append(_Row(number, pixels, read.prompt or "", read.keys[name]))
            if len(group) >= self._most(pixels):
                self._judge(name, groups.pop(pixels.shape))
            elif self._fits(name) and sum(map(len, groups.values())) >= 2 * self.settings.max_batch:
                self._judge(name, self._some(name))
            self.bytes += pixels.nbytes
        while self.bytes > MOST_WAITING:
            name = max(self.judges, key=lambda name: sum(map(len, self.waiting[name].values())))
            self._judge(name, self._some(name))

    def _fits(self, name: str) -> bool:
        """Whether a reward can be shown pictures of several sizes together."""
        return hasattr(self.judges[name], "fit")

    def _most(self, pixels: np.ndarray) -> int:
        """Pictures of this size in a full batch."""
        return min(self.settings.max_batch, max(1, MOST_PIXELS // int(pixels.shape[1] * pixels.shape[2])))

    def _some(self, name: str) -> list[_Row]:
        """The next batch: of several sizes where the reward can be shown them, else the largest group of one size."""
        groups = self.waiting[name]
        if not self._fits(name):
            return groups.pop(max(groups, key=lambda shape: len(groups[shape])))
        rows: list[_Row] = []
        for shape in sorted(groups, key=lambda shape: len(groups[shape])):  # those that are likely never to fill one
            space = self.settings.max_batch - len(rows)
            rows += groups[shape][:space]
            groups[shape] = groups[shape][space:]
        self.waiting[name] = {shape: group for shape, group in groups.items() if group}
        return rows

    def _judge(self, name: str, rows: list[_Row]) -> None:
        """Judge some pictures; where that fails, each by itself."""
        import torch

        judge, values = self.judges[name], np.full(len(rows), np.nan)
        mixed = len({row.pixels.shape for row in rows}) > 1
        self.bytes -= sum(row.pixels.nbytes for row in rows)

        def see(pixels: Any, prompts: Sequence[str], *, sigma: float) -> Any:
            return judge.see(pixels, prompts)

        def look(chosen: Sequence[int]) -> None:
            some = [rows[n] for n in chosen]
            prompts = [row.prompt for row in some]
            if mixed:
                seen = torch.cat([judge.fit(_tensor([row.pixels], self.device)) for row in some])
            else:
                seen = _tensor([row.pixels for row in some], self.device)
            reward = (Timed(name, see, judge.timeout) if isinstance(judge, Timed) else see) if mixed else judge
            values[list(chosen)] = judge_in_parts(self.limits, name, reward, seen, prompts, self.settings.sigma)

        errors = apart(look, [[n] for n in range(len(rows))])
        if all(errors) and len(rows) == self.settings.max_batch > 1:
            raise ValueError(f"reward {name} fails: {errors[0]}") from errors[0]
        lines = []
        for row, value, error in zip(rows, values.tolist(), errors, strict=True):
            if error or not np.isfinite(value):
                why = f"{type(error).__name__}: {error}" if error else f"it returned {value:g}"
                self.faults[row.item] = f"is not judged by {name}: {' '.join(why.split())}"
                continue
            self.values[row.item][name] = value
            prompt, note = self.told[row.item]
            lines.append({"key": row.key, "file": self.items[row.item].name, "reward": name, "value": value,
                          "prompt": prompt, "note": note})  # fmt: skip
        if self.journal:
            self.journal.add(lines)
        self._done([row.item for row in rows])

    def _done(self, numbers: Sequence[int]) -> None:
        """A reward is done with each of these pictures."""
        whole = 0
        for number in numbers:
            self.left[number] -= 1
            whole += not self.left[number]
        if self.on_images and whole:
            self.on_images(whole)

    def _scores(self, left_out: list[str]) -> Scores:
        """The best first."""
        names = list(self.judges)
        all_of = [
            Scored(item.name, *self._said(n), path=item.source if isinstance(item.source, Path) else None)
            for n, item in enumerate(self.items)
        ]
        whole = [picture for picture in all_of if not picture.fault]
        if whole:
            values = np.array([[[picture.rewards[name] for name in names] for picture in whole]])
            alive = np.ones(values.shape[:2], dtype=bool)
            whole = [whole[place] for place in order(self.settings.rule(names)(values, alive), alive)[0]]
        return Scores(names, whole + [picture for picture in all_of if picture.fault], self.found, left_out)

    def _said(self, n: int) -> tuple[str, dict[str, float], str, str]:
        prompt, note = self.told[n]
        return prompt, self.values[n], note, self.faults[n]


def _items(pictures: Any, prompt: Any) -> tuple[list[Item], list[str]]:
    """What is to be judged, and the names of what was left out."""
    from PIL.Image import Image

    from ttsnap.files.finding import Found

    sources = [pictures] if isinstance(pictures, str | Path | Image) else pictures
    if isinstance(pictures, Found):
        found, sources = pictures, [*pictures.files]
    elif any(isinstance(source, Image) for source in sources):
        found = Found([])
    else:
        found = find_pictures([str(source) for source in sources], marker=JOURNAL)
        sources = [*found.files]
    if not sources:
        raise ValueError("there are no pictures to score")
    names = [printable(source) if isinstance(source, Path) else f"picture {n}" for n, source in enumerate(sources)]
    texts: list[str | None] = [found.prompts.get(source) if isinstance(source, Path) else None for source in sources]
    if isinstance(prompt, str):
        texts = [prompt] * len(sources)
    elif isinstance(prompt, Mapping):
        texts = [_prompt_of(source, prompt) or text for source, text in zip(sources, texts, strict=True)]
    elif prompt is not None:
        if len(prompt) != len(sources):
            raise ValueError(f"{len(sources)} pictures need as many prompts, got {len(prompt)}")
        texts = list(prompt)
    texts = [" ".join(text.split()) or None if text else None for text in texts]
    items = [
        Item(name, Path(source) if isinstance(source, str) else source, text)
        for name, source, text in zip(names, sources, texts, strict=True)
    ]
    return items, [printable(path) for path in found.left_out]


def _prompt_of(source: Any, prompts: Mapping[str, str]) -> str | None:
    """The prompt of a file by its path, the end of its path, or its name."""
    if not isinstance(source, Path):
        return None
    parts = source.parts
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    return next((prompts[end] for end in (str(source), *ends, source.stem) if end in prompts), None)


def printable(path: Path) -> str:
    """A path as text that can be printed, whatever bytes it is made of."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _reward_keys(reward: rewards.Rewards, names: Sequence[str], sigma: float) -> dict[str, str]:
    """What decides the word of each reward: its name, weights or code, and the noise level.

    A callable may depend on what its code does not show, so that its word is never taken from an earlier run.
    """
    if callable(reward) or isinstance(reward, Mapping):
        return {name: uuid.uuid4().hex for name in names}
    texts = rewards.split(reward)
    return {
        name: json.dumps([name, text, reward_contents(text), sigma]) for name, text in zip(names, texts, strict=True)
    }


def _tensor(pixels: Sequence[np.ndarray], device: Any) -> Tensor:
    """Images [n, 3, h, w] in 0..1 of so many [3, h, w] of 8 bits."""
    import torch

    return torch.from_numpy(np.stack(pixels)).to(device).float().div_(255)


def save(scores: Scores, folder: Path, *, sheet: bool = True) -> dict[str, str]:
    """Write `scores.csv`, `scores.json` and the contact sheet; their paths, by what they are."""
    from ttsnap.files.provenance import versions
    from ttsnap.files.storage import write, write_json
    from ttsnap.live.contact_sheet import contact_sheet
    from ttsnap.live.result import save_image

    files = {"table": folder / "scores.csv", "record": folder / "scores.json"}
    write(files["table"], _csv(scores).encode())
    told = {
        name: value for name, value in scores.to_dict().items() if name != "found"
    }  # the same however it came about
    write_json(told | {"versions": versions()}, files["record"])
    if sheet and scores.ranked:
        files["contact sheet"] = folder / "contact.png"
        save_image(contact_sheet(scores), files["contact sheet"])
    return {kind: str(path) for kind, path in files.items()}


def _csv(scores: Scores) -> str:
    """A line per picture, the best first; `ttsnap score` reads it again."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["rank", "file", *scores.rewards, "prompt", "note", "fault"])
    for place, p in enumerate(scores.pictures, 1):
        file = printable(p.path.absolute()) if p.path else p.name
        rank = "" if p.fault else place
        table.writerow([rank, file, *(p.rewards.get(name, "") for name in scores.rewards), p.prompt, p.note, p.fault])
    return text.getvalue()
