"""What a live search found, and how it is written to disk."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ttsnap.core.cost import Cost, format_amount
from ttsnap.core.observers import Seen
from ttsnap.core.tree import Tree
from ttsnap.files.metadata import FORMATS, Metadata, encode
from ttsnap.files.storage import AnyPath, atomically, location, write, write_json
from ttsnap.live import rerun

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

    from ttsnap.core.grid import IntArray
    from ttsnap.core.observers import Result
    from ttsnap.live.reporting import HeldOut


class Finished(NamedTuple):
    """One finished image: its seed, its reward (combined, if there are several), each reward by name.

    Of a video, `image` is its middle frame and `frames` are all of them, uint8 [frames, h, w, 3].
    """

    seed: int
    reward: float
    rewards: dict[str, float]
    image: Image
    frames: Any = None

    def save(self, path: str | AnyPath) -> None:
        """Write the picture alone; `SearchResult.save` writes it with how it was made."""
        path = location(path)
        write(path, encode(self.image, kind=FORMATS.get(path.suffix.lower(), "PNG")))

    def _repr_png_(self) -> bytes:
        """What a notebook shows of it."""
        return encode(self.image)


class Ancestor(NamedTuple):
    """Where a fork began a candidate: from which seed's candidate, after how many calls, by how many degrees."""

    seed: int
    step: int
    angle: float


@dataclass(frozen=True)
class BestOfNComparison:
    """What best-of-N gets for the same cost, on the first N of the same seeds; `best` is None if it was not run.

    `num_steps` are those of its images; None: as many as the search's.
    """

    candidates: int
    cost: Cost
    best: Finished | None = None
    num_steps: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a JSON object."""
        best = self.best
        return {
            "candidates": self.candidates,
            "cost": self.cost.to_dict(),
            "seed": best.seed if best else None,
            "reward": best.reward if best else None,
            "reward_by_name": best.rewards if best else None,
        } | ({"num_steps": self.num_steps} if self.num_steps else {})


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a live search for one prompt.

    Attributes:
        prompt: the prompt.
        model: name of the model.
        policy: the policy as a JSON object.
        images: the best finished images, best first.
        cost: calls, decodes, looks, TFLOP and measured seconds (of a block of prompts: this prompt's share by calls).
        started: candidates started.
        finished: candidates brought to the last step.
        history: per seed, every look at it.
        best_of_n: what best-of-N gets for the same cost, with as many steps.
        best_of_n_at: and with other numbers of steps, if it was compared with them.
        num_steps: denoiser calls of a finished image.
        preview: what early looks saw: full, tiny, small or linear.
        reproduce: how the stock pipeline makes the winning image, or why it alone does not.
        diversity: parameters of negative token merging, if it was at work.
        rewards: names of the rewards that judged finished images.
        guides: what judged the looks, by those names, where it is another (a noise-aware reward).
        stopped: the search was stopped before its policy ended; there are no images if none was finished by then.
        combine: how several rewards became one number, in words.
        weights: by which several rewards were added, if they were.
        held_out: what rewards that steered nothing say of the finished images.
        lineage: by seed, where a candidate comes from that a fork began (the last fork in its place).
        tree: of a search that forked, all that it looked at, for replay.
        origin: what its pictures keep of how they were made.
    """

    prompt: str
    model: str
    policy: dict[str, Any]
    images: list[Finished]
    cost: Cost
    started: int
    finished: int
    history: dict[int, list[Seen]]
    best_of_n: BestOfNComparison
    num_steps: int
    reproduce: str
    budget: str | None = None
    best_of_n_at: list[BestOfNComparison] = field(default_factory=list)
    preview: str = "full"
    notes: list[str] = field(default_factory=list)
    diversity: dict[str, Any] | None = None
    rewards: list[str] = field(default_factory=list)
    guides: dict[str, str] = field(default_factory=dict)
    stopped: bool = False
    combine: str = "one reward"
    weights: list[float] | None = None
    held_out: list[HeldOut] = field(default_factory=list)
    lineage: dict[int, Ancestor] = field(default_factory=dict)
    tree: Tree | None = field(default=None, repr=False)
    origin: rerun.Origin = field(default_factory=rerun.Origin)

    @property
    def best(self) -> Finished:
        """The chosen image with its seed and rewards.

        Raises:
            ValueError: the search was stopped before an image was finished.
        """
        if not self.images:
            raise ValueError("the search was stopped before an image was finished")
        return self.images[0]

    @property
    def image(self) -> Image:
        """The chosen image."""
        return self.best.image

    @property
    def reward(self) -> float:
        """The reward of the chosen image (with several rewards: their combination)."""
        return self.best.reward

    @property
    def seed(self) -> int:
        """The seed of the chosen image."""
        return self.best.seed

    def frame(self) -> pd.DataFrame:
        """The history as a data frame, one row per look: seed, parent, step, reward, kept, wins, draft.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas as pd

        rows = [
            (seed, self._parent(seed, seen.step), seen.step, seen.reward, seen.kept, seen.wins, seen.draft)
            for seed, looks in self.history.items()
            for seen in looks
        ]
        found = pd.DataFrame(rows, columns=["seed", "parent", "step", "reward", "kept", "wins", "draft"])
        return found.astype({"parent": "Int64"}).sort_values(["step", "seed"], ignore_index=True)

    def _parent(self, seed: int, step: int) -> int | None:
        """The seed in whose place a candidate's parent stood, where a fork had begun it by that step."""
        ancestor = self.lineage.get(seed)
        return ancestor.seed if ancestor and ancestor.step < step else None

    def _repr_html_(self) -> str:
        """What a notebook shows of it: the picture, what it cost, and the pruning board to open."""
        from ttsnap.live.notebook import html

        return html(self)

    def to_dict(self) -> dict[str, Any]:
        """The record as a JSON object (`result.json`)."""
        mine = self.images[0] if self.images else None
        return {
            "prompt": self.prompt,
            "model": self.model,
            "rewards": self.rewards,
            "guides": self.guides,
            "policy": self.policy,
            "seed": mine.seed if mine else None,
            "reward": mine.reward if mine else None,
            "reward_by_name": mine.rewards if mine else None,
            "num_steps": self.num_steps,
            "preview": self.preview,
            "budget": self.budget,
            "candidates": {"started": self.started, "finished": self.finished},
            "cost": self.cost.to_dict(),
            "best_of_n_at_this_cost": self.best_of_n.to_dict(),
            "best_of_n_at_other_steps": [other.to_dict() for other in self.best_of_n_at],
            "top": [{"seed": f.seed, "reward": f.reward, "rewards": f.rewards} for f in self.images],
            "history": [{"seed": seed, "looks": list(map(_said, looks))} for seed, looks in self.history.items()],
            "reproduce": self.reproduce,
            "diversity": self.diversity,
            "stopped": self.stopped,
            "combine": self.combine,
            "weights": self.weights,
            "held_out": [held_out.to_dict() for held_out in self.held_out],
            "lineage": [
                {"seed": seed, "parent": a.seed, "step": a.step, "angle": a.angle} for seed, a in self.lineage.items()
            ],
            "notes": self.notes,
        }

    def board(self) -> Image:
        """The pruning board: the whole search in one picture (needs previews, which `search` keeps by default)."""
        from PIL import Image

        from ttsnap.live.board import Finish, Row, Tile, draw

        rows = []
        for late, step in sorted({(not s.draft, s.step) for looks in self.history.values() for s in looks}):
            tiles = [
                Tile(seed, Image.fromarray(seen.picture), seen.reward, seen.kept, seen.wins, self._name(seed, step))
                for seed, looks in self.history.items()
                for seen in looks
                if seen.step == step and seen.draft != late and seen.picture is not None
            ]
            rows.append(Row(step, tiles, draft=not late))
        name = self.policy["policy"]
        finishes = [
            Finish(
                f"{name}: {self.started} started, {self.finished} finished",
                mine.image,
                [f"reward {mine.reward:.3f} (seed {mine.seed})", cost_line(self.cost), *self._held_out_lines()],
            )
            for mine in self.images[:1]
        ]
        for one in (self.best_of_n, *self.best_of_n_at):
            if one.best is None:
                continue
            lines = [f"reward {one.best.reward:.3f} (seed {one.best.seed})", cost_line(one.cost)]
            if one is self.best_of_n:
                lines += [f"{h.name} {h.best_of_n:.3f} (held out)" for h in self.held_out if h.best_of_n is not None]
            steps = f"with {one.num_steps} steps" if one.num_steps else "all finished"
            cost = "same budget" if one.cost.tflop <= self.cost.tflop else "the least"
            finishes.append(Finish(f"best-of-{one.candidates}: {steps}, {cost}", one.best.image, lines))
        guides = f" · looks by {', '.join(self.guides.values())}" if self.guides else ""
        facts = [f"{self.model} · reward: {', '.join(self.rewards)}{guides} · {cost_line(self.cost)}"]
        if self.stopped:
            facts.append("Stopped before its end." if self.images else "Stopped before an image was finished.")
        return draw(self.prompt, self.num_steps, rows, finishes, facts)

    def _name(self, seed: int, step: int) -> str:
        """How the board calls a candidate of a search that forked: `#6<5` is a child of 5's."""
        if not self.lineage:
            return ""
        parent = self._parent(seed, step)
        return f"#{seed}" if parent is None else f"#{seed}<{parent}"

    def _held_out_lines(self) -> list[str]:
        return [
            f"{h.name} {h.reward:.3f} (held out; median of {h.images} finished {h.median:.3f})"
            + (": worse than the median" if h.parted else "")
            for h in self.held_out
        ]

    def metadata(self, rank: int = 1) -> Metadata:
        """What the picture of a rank says of itself in its file: 1 is the best; 0 is that of best-of-N."""
        return rerun.metadata(self, rank, self.best_of_n)

    def save(self, folder: str | AnyPath, *, board: bool = True, metadata: bool = True) -> dict[str, Any]:
        """Write the images, the board and `result.json` (last, so that its presence means "complete").

        A search that forked also leaves `tree.json`, which `ttsnap simulate` replays.

        Args:
            folder: where they go.
            board: draw the pruning board.
            metadata: let the pictures say how they were made; see `ttsnap.files.metadata`.

        Returns:
            The JSON object, with the file names.
        """
        folder = location(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = ["best.png", *(f"top{n}.png" for n in range(2, len(self.images) + 1))]
        files: dict[str, Any] = {"images": names[: len(self.images)]}

        def says(rank: int) -> Metadata | None:
            return self.metadata(rank) if metadata and (rank == 0 or self.images) else None

        for rank, (name, finished) in enumerate(zip(files["images"], self.images, strict=True), 1):
            save_image(finished.image, folder / name, says(rank))
            if finished.frames is not None:
                films = files.setdefault("videos", [])
                films.append(name.removesuffix(".png") + ".webp")
                save_video(finished.frames, folder / films[-1], says(rank))
        record = self.to_dict() | {"files": files}
        if self.best_of_n.best:
            record["files"]["best_of_n"] = "best_of_n.png"
            save_image(self.best_of_n.best.image, folder / "best_of_n.png", says(0))
        for other in self.best_of_n_at:
            if other.best:
                name = f"best_of_n_{other.num_steps}.png"
                record["files"].setdefault("best_of_n_at", []).append(name)
                save_image(other.best.image, folder / name, rerun.metadata(self, 0, other) if metadata else None)
        if board:
            record["files"]["board"] = "board.png"
            save_image(self.board(), folder / "board.png", says(1))
        if self.tree:
            record["files"]["tree"] = "tree.json"
            write_json(self.tree.to_dict(), folder / "tree.json")
        write_json(record, folder / "result.json")
        return record


def history_of(
    result: Result,
    p: int,
    seeds: Sequence[int] | IntArray,
    num_steps: int,
    pictures: Mapping[tuple[int, int, int], np.ndarray] | None = None,
) -> dict[int, list[Seen]]:
    """Per seed, every look at it: of row `p` of a search, live or replayed.

    Args:
        result: with its history.
        p: row of the grid.
        seeds: of that row [candidates].
        num_steps: denoiser calls of a finished image.
        pictures: previews by (prompt, candidate, step), if there are any.
    """
    history: dict[int, list[Seen]] = {}
    wins = int(result.chosen[p])  # who is, or becomes, the winner; and who goes on, looking back from the end
    goes_on = np.zeros(len(seeds), dtype=bool)
    forks = list(result.forks)
    looks: list[list[tuple[int, Seen]]] = []  # the last first
    for number in reversed(range(len(result.history))):
        look = result.history[number]
        while forks and forks[-1][0] > number:
            parents = forks.pop()[1].parents[p]
            is_child = parents >= 0
            parent_of = set(parents[is_child & goes_on].tolist())
            wins = int(parents[wins]) if wins >= 0 and is_child[wins] else wins
            goes_on &= ~is_child
            goes_on[list(parent_of)] = True
        looks.append([])
        for c in map(int, np.flatnonzero(look.alive[p])):
            kept = bool(c == result.chosen[p]) if look.step == num_steps else bool(goes_on[c])
            picture = (pictures or {}).get((p, c, look.step))
            seen = Seen(look.step, float(look.combined[p, c]), kept, picture, c == wins, look.draft)
            looks[-1].append((int(seeds[c]), seen))
        goes_on |= look.alive[p]
    for seed, seen in itertools.chain.from_iterable(reversed(looks)):
        history.setdefault(seed, []).append(seen)
    return history


def _said(seen: Seen) -> dict[str, Any]:
    """A look as a JSON object."""
    said = {"step": seen.step, "reward": seen.reward, "kept": seen.kept}
    return said | {"draft": True} if seen.draft else said


def cost_line(cost: Cost) -> str:
    """A cost for people: `121 NFE, 14.2 GFLOP, 1.3 s`."""
    parts = [f"{cost.nfe} NFE", format_amount(cost.tflop, "TFLOP")]
    if cost.seconds == cost.seconds:
        parts.append(f"{cost.seconds:.3g} s")
    return ", ".join(parts)


def save_image(image: Image, path: AnyPath, metadata: Metadata | None = None) -> None:
    """Write a PNG, or what the end of the name says, atomically."""
    write(path, encode(image, metadata, kind=FORMATS.get(path.suffix.lower(), "PNG")))


def save_video(frames: Any, path: AnyPath, metadata: Metadata | None = None, *, milliseconds: int = 42) -> None:
    """Write frames [n, h, w, 3] (uint8) as a lossless animated WebP, 24 frames a second, atomically."""
    from PIL import Image

    first, *others = [Image.fromarray(frame) for frame in frames]
    options = {"save_all": True, "append_images": others, "duration": milliseconds, "loop": 0, "lossless": True}
    write(path, encode(first, metadata, kind="WEBP", **options))


__all__: Sequence[str] = ["BestOfNComparison", "Finished", "SearchResult", "Seen", "atomically", "cost_line"]
