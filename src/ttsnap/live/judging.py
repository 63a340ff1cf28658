"""What rewards say of candidates: one number each, whatever they read; and what can be saved when one fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.pipelines.patience import Around, Hung, Timed, in_time
from ttsnap.rewards import Rewards, load, own_of

if TYPE_CHECKING:
    from torch import Tensor

    from ttsnap.pipelines.limits import Limits
    from ttsnap.pipelines.replicas import Replicas
    from ttsnap.pipelines.views import View


def judge(name: str, reward: Any, seen: Tensor | View, prompts: Sequence[str], sigma: float) -> np.ndarray:
    """Rewards [n] of images [n, 3, h, w] in 0..1 or of a view of candidates, fp32 on the CPU.

    Of a view, a reward that reads features is given these wherever it can, and pictures elsewhere.

    Raises:
        ValueError: the reward did not answer with one number per image.
        Hung: it did not answer in time.
    """
    import torch

    from ttsnap.pipelines.views import View, reads_features

    def ask() -> np.ndarray:
        if of_features is None:
            answer = _of_frames(reward, pictures, prompts, sigma)
        else:
            answer = reward.early(of_features, prompts, sigma=sigma)
        return numbers(name, answer, len(seen))

    with torch.no_grad():
        of_features = seen.features if isinstance(seen, View) and reads_features(reward, sigma) else None
        pictures: Any = seen.shown if isinstance(seen, View) and of_features is None else seen
        return in_time(reward, len(seen), ask)


def numbers(name: str, answer: Any, count: int) -> np.ndarray:
    """What a reward answered about `count` images as rewards [count], fp32 on the CPU.

    Args:
        name: of the reward.
        answer: one number per image: a tensor, array or list, also [count, 1]; of one image also a number.
        count: of images.

    Raises:
        ValueError: it is not one number per image.
    """
    import torch

    rule = f"reward {name!r} must return one number per image, shape [{count}]"
    try:
        values = torch.as_tensor(answer).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{rule}, got {type(answer).__name__}") from error
    if values.shape not in ((count,), (count, 1)) and not (count == 1 and values.shape == ()):
        raise ValueError(f"{rule}, got {list(values.shape)}")
    found: np.ndarray = values.reshape(count).numpy()
    return found


def _of_frames(reward: Any, images: Tensor, prompts: Sequence[str], sigma: float) -> Any:
    """What a reward says of images [n, 3, h, w]; of videos [n, frames, 3, h, w], its mean over the frames."""
    import torch

    if images.ndim == 4:
        return reward(images, prompts, sigma=sigma)
    videos, frames = images.shape[:2]
    values = torch.as_tensor(reward(images.flatten(0, 1), [p for p in prompts for _ in range(frames)], sigma=sigma))
    if values.numel() != videos * frames:
        raise ValueError(f"a reward must return one number per frame, [{videos * frames}], got {list(values.shape)}")
    return values.reshape(videos, frames).float().mean(1)


EACH = "each"  # the device of rewards that have a copy on each device of the search
SHARE = 4  # pictures that one of them is shown at once on the CPU, however many devices there are


class Dealt(Around):
    """A reward with a copy on each device of a search; pictures are dealt out among them.

    Args:
        name: of the reward, which the copies have, too.
        reward: the one on the search's first device.
        replicas: the others, where it was installed.
    """

    def __init__(self, name: str, reward: Any, replicas: Replicas) -> None:
        self.name, self.reward, self.replicas = name, reward, replicas

    def __call__(self, images: Tensor, prompts: Sequence[str], *, sigma: float) -> Tensor:
        """Rewards [n] of images [n, 3, h, w]."""
        import torch

        from ttsnap.pipelines.replicas import Use

        count = len(images)
        size = SHARE if images.device.type == "cpu" else -(-count // self.replicas.count)
        rows = [slice(start, start + size) for start in range(0, count, size)]
        uses = [Use(self.name, (images[part], list(prompts[part])), {"sigma": sigma}) for part in rows]
        answers = self.replicas.spread(uses, self.reward)
        shares = [min(size, count - part.start) for part in rows]
        return torch.cat([torch.from_numpy(numbers(self.name, a, n)) for a, n in zip(answers, shares, strict=True)])


def deal(judges: Mapping[str, Any], named: Sequence[str], replicas: Replicas) -> dict[str, Any]:
    """Rewards, each with a copy on each device of a search.

    Args:
        judges: name -> reward, on the first device.
        named: what they were loaded by, in the same order.
        replicas: the other devices.

    Raises:
        ValueError: one cannot be loaded there.
    """
    from ttsnap.pipelines.replicas import Tool

    for name, text in zip(judges, named, strict=True):
        replicas.install(Tool(name, partial(_loaded, text)))
    return {name: Dealt(name, judge, replicas) for name, judge in judges.items()}


def _loaded(text: str, device: Any) -> Any:
    return next(iter(load(text, device).values()))


def try_own(named: Rewards, prompt: str, size: tuple[int, int] | None, timeout: float | None = None) -> None:
    """`try_out` of all rewards of one's own among those that are named; each has to answer within `timeout` seconds."""
    for name, reward in own_of(named).items():
        try_out(name, Timed(name, reward, timeout) if timeout else reward, prompt, size)


def try_out(name: str, reward: Any, prompt: str, size: tuple[int, int] | None) -> None:
    """Show two pictures to a reward of one's own, before a model is loaded.

    Args:
        name: of the reward.
        reward: a function.
        prompt: what it is asked about.
        size: height and width, where they are known; else it may be one that takes no pictures of 256 x 256.

    Raises:
        ValueError: it fails, or does not answer with one number per image.
    """
    import torch

    from ttsnap.pipelines.counting import some_pictures

    pictures, failure = some_pictures(2, *(size or (256, 256))), None

    def ask() -> Any:
        nonlocal failure
        try:
            return reward(pictures, [prompt, prompt], sigma=0.0)
        except Exception as error:
            failure = error
            raise

    try:
        with torch.no_grad():
            answer = in_time(reward, 2, ask)
    except Exception as error:
        if failure is None:
            raise
        if size is None and isinstance(error, RuntimeError):
            return
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"reward {name!r} fails on two pictures ({what}); it is called as reward(images, prompts, sigma=...) "
            "with images [n, 3, h, w] in 0..1, PIL pictures or an array [n, h, w, 3] of 8 bits, and returns n numbers"
        ) from error
    numbers(name, answer, 2)


def judge_in_parts(
    limits: Limits, name: str, reward: Any, seen: Tensor | View, prompts: Sequence[str], sigma: float
) -> np.ndarray:
    """The same; where memory runs out, of half as many at a time, from then on.

    Raises:
        MemoryError: not even one image fits.
        ValueError: the reward did not answer with one number per image.
    """

    def work(rows: slice) -> np.ndarray:
        return judge(name, reward, seen[rows], prompts[rows], sigma)

    too_big = f"one image of reward {name!r} does not fit into memory"
    return np.concatenate(limits.run(f"reward {name}", len(seen), work, too_big))


def apart(look: Callable[[Sequence[int]], None], parts: Sequence[Sequence[int]]) -> list[Exception | None]:
    """Look at all rows at once; where that fails, at each part alone, until a reward hangs on one.

    Args:
        look: judges some rows; may raise.
        parts: rows that stand and fall together, such as those of one prompt.

    Returns:
        For each part its error, or None.
    """
    errors: list[Exception | None] = [None] * len(parts)
    try:
        look([row for rows in parts for row in rows])
    except Exception as error:
        if len(parts) == 1:
            return [error]
        for number, rows in enumerate(parts):
            try:
                look(rows)
            except Hung as error:
                errors[number:] = [error] * (len(parts) - number)
                break
            except Exception as error:
                errors[number] = error
    return errors
