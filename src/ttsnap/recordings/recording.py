"""A recording: rewards of every candidate after every call, an xarray dataset on zarr.

One zarr group holds the arrays `clean`, `aware`, `seed` and `sigma`; prompts, reward names and provenance are its
attributes. Rewards are written prompt by prompt, `clean` last, and each chunk is renamed into place: a prompt is either
wholly there or not at all, whatever kills the writer.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ttsnap.core.grid import BoolArray, IntArray
from ttsnap.files.storage import AnyPath, Remote, location, new_folder, options, patiently, vanished

if TYPE_CHECKING:
    import xarray as xr

FORMAT, VERSION = "ttsnap-recording", 1
DIMS = ("prompt", "candidate", "step", "reward")
_ARRAYS = {"clean": DIMS, "aware": DIMS, "seed": DIMS[:2], "sigma": DIMS[2:3]}
_WHOLE_CHUNK = 2**25  # rewards in a chunk when everything is written at once


class Recording:
    """Clean and noise-aware rewards of the x0 estimates of a pool of candidates.

    Attributes:
        path: the zarr directory.
        prompts: all prompts [P], recorded or not yet.
        rewards: reward names [R].
        scales: per reward (mean, std); results are shown as (reward - mean) / std.
        provenance: where it comes from.
        notes: what else it keeps, by name.
    """

    def __init__(self, path: str | AnyPath) -> None:
        """Open a recording; see `open`."""
        self.path = location(path)
        self._group = _open_group(self.path)
        self._arrays: dict[str, Any] = {}
        attributes = dict(self._group.attrs)
        self._check(attributes)
        self.prompts: tuple[str, ...] = tuple(attributes["prompts"])
        self.rewards: tuple[str, ...] = tuple(attributes["rewards"])
        self.scales: dict[str, tuple[float, float]] = {
            name: (float(pair[0]), float(pair[1])) for name, pair in attributes.get("scales", {}).items()
        }
        self.provenance: dict[str, Any] = attributes.get("provenance", {})
        self.notes: dict[str, Any] = attributes.get("notes", {})

    @classmethod
    def open(cls, path: str | AnyPath) -> Recording:
        """Open a recording and check it.

        Raises:
            ValueError: not a recording, an unknown version, missing or misshapen arrays, or a candidate of a recorded
                prompt without its finished image's reward; one sentence each.
        """
        recording = cls(path)
        recording._check_rewards()
        return recording

    @classmethod
    def create(
        cls,
        path: str | AnyPath,
        *,
        prompts: Sequence[str],
        num_candidates: int,
        num_steps: int,
        rewards: Sequence[str],
        sigmas: Sequence[float] | None = None,
        scales: Mapping[str, tuple[float, float]] | None = None,
        provenance: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        whole: bool = False,
        resume: bool = False,
    ) -> Recording:
        """Start a recording without rewards; `write_prompt` fills it.

        Args:
            path: the zarr directory to make.
            prompts: all prompts [P].
            num_candidates: candidates per prompt.
            num_steps: denoiser calls of a finished image.
            rewards: reward names [R].
            sigmas: noise level of the x0 estimate after each call [steps] (optional).
            scales: per reward (mean, std) by which results are shown (optional).
            provenance: configuration, seeds, versions; anything JSON.
            dtype: float32 (rewards are computed in it), or float64.
            whole: everything will be written at once; fewer, larger chunks.
            resume: go on with a recording of the same size and prompts if there is one.

        Raises:
            ValueError: something is there already, or it has another size.
        """
        import zarr

        path = location(path)
        shape = (len(prompts), num_candidates, num_steps, len(rewards))
        if 0 in shape:
            raise ValueError(f"a recording needs prompts, candidates, steps and rewards, got sizes {shape}")
        if len(set(rewards)) != len(rewards):
            raise ValueError(f"reward names must differ, got {', '.join(rewards)}")
        if path.exists():
            if not resume:
                raise ValueError(f"{path} exists already; resume it, remove it, or choose another name")
            found = cls(path)
            same = found.shape == shape and found.prompts == tuple(prompts) and found.rewards == tuple(rewards)
            if not same:
                raise ValueError(f"{path} holds another recording: sizes {found.shape}, {', '.join(found.rewards)}")
            if isinstance(path, Path):
                for left in path.rglob("*.partial"):  # zarr's, of a process that was killed
                    left.unlink(missing_ok=True)
            return found
        per_chunk = max(1, min(len(prompts), _WHOLE_CHUNK // int(np.prod(shape[1:])))) if whole else 1
        with new_folder(path, "zarr.json") as temporary:
            group = zarr.create_group(temporary, zarr_format=3)
            kinds = {"clean": (dtype, np.nan), "aware": (dtype, np.nan), "seed": ("int64", -1), "sigma": ("f8", np.nan)}
            for name, dims in _ARRAYS.items():
                size = tuple(shape[DIMS.index(dim)] for dim in dims)
                group.create_array(
                    name,
                    shape=size,
                    chunks=(per_chunk, *size[1:]) if "prompt" in dims else size,
                    dtype=kinds[name][0],
                    fill_value=kinds[name][1],
                    dimension_names=dims,
                )
            group["sigma"][:] = np.full(num_steps, np.nan) if sigmas is None else np.asarray(sigmas, dtype=float)
            group.attrs.update(
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "prompts": list(prompts),
                    "rewards": list(rewards),
                    "scales": {name: list(pair) for name, pair in (scales or {}).items()},
                    "provenance": dict(provenance or {}),
                }
            )
        return cls(path)

    def write_prompt(
        self, prompt: int, clean: np.ndarray, aware: np.ndarray | None = None, seeds: np.ndarray | None = None
    ) -> None:
        """Write the rewards of one prompt; it counts as recorded only when all of it is in place.

        Args:
            prompt: index of the prompt.
            clean: clean rewards [candidates, steps, rewards]; NaN where a step was not judged, never at the last step.
            aware: noise-aware rewards [candidates, steps, rewards], NaN where there are none (optional).
            seeds: seed of each candidate [candidates] (optional).

        Raises:
            ValueError: wrong shape, or a finished image without a reward.
        """
        self.write(
            slice(prompt, prompt + 1),
            np.asarray(clean)[None],
            None if aware is None else np.asarray(aware)[None],
            None if seeds is None else np.asarray(seeds)[None],
        )

    def write(
        self, where: slice, clean: np.ndarray, aware: np.ndarray | None = None, seeds: np.ndarray | None = None
    ) -> None:
        """Write consecutive prompts at once, arrays as in `write_prompt` with a leading axis; chunk by chunk atomic."""
        size = (len(range(*where.indices(len(self.prompts)))), *self.shape[1:])
        for name, values, expected in (("clean", clean, size), ("aware", aware, size), ("seeds", seeds, size[:2])):
            if values is not None and values.shape != expected:
                raise ValueError(f"{name} rewards of {size[0]} prompts must have shape {expected}, got {values.shape}")
        if not np.isfinite(clean[:, :, -1]).all():
            prompt, candidate, _ = np.argwhere(~np.isfinite(clean[:, :, -1]))[0]
            name = self.prompts[where.indices(len(self.prompts))[0] + prompt]
            raise ValueError(f"the finished image of candidate {candidate} of prompt {name!r} has no finite reward")
        for name, values in (("seed", seeds), ("aware", aware), ("clean", clean)):
            if values is not None:
                self._store(name, where, values)
        for name in ("clean", "aware", "seeds"):
            self.__dict__.pop(name, None)

    def add_array(self, name: str, shape: tuple[int, ...], dtype: str, dims: tuple[str, ...]) -> None:
        """Make one more array [prompts, ...], a chunk per prompt, where there is none of that name yet."""
        if name not in self._group:
            self._group.create_array(
                name, shape=shape, chunks=(1, *shape[1:]), dtype=dtype, fill_value=0, dimension_names=dims
            )

    def write_array(self, name: str, prompt: int, values: np.ndarray | np.generic) -> None:
        """Write a prompt's part of an added array; to be done before its rewards, which say that it is recorded."""
        self._store(name, slice(prompt, prompt + 1), np.asarray(values)[None])

    def read_array(self, name: str, prompt: int) -> np.ndarray:
        """A prompt's part of an added array."""
        found: np.ndarray = _asked(lambda: self._array(name)[prompt], self.path)
        return found

    def note(self, name: str, value: Any) -> None:
        """Keep a note, anything JSON."""
        self.notes[name] = value
        self._group.attrs["notes"] = self.notes

    def _store(self, name: str, where: slice, values: np.ndarray) -> None:
        def store() -> None:
            self._array(name)[where] = values

        if isinstance(self.path, Path) and not (self.path / "zarr.json").exists():
            raise vanished(self.path)
        try:
            _asked(store, self.path)
        except OSError as error:  # such as a full disk
            error.filename = error.filename or (str(self.path) if error.errno else None)
            raise

    def _array(self, name: str) -> Any:
        """An array, opened once."""
        if name not in self._arrays:
            self._arrays[name] = _asked(lambda: self._group[name], self.path)
        return self._arrays[name]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Sizes (prompts, candidates, steps, rewards), prompts not yet recorded included."""
        prompts, candidates, steps, rewards = self._array("clean").shape
        return prompts, candidates, steps, rewards

    @property
    def sigmas(self) -> np.ndarray:
        """Noise level of the x0 estimate after each call [steps], NaN where unknown."""
        return _read(self._array("sigma"), self.path)

    @functools.cached_property
    def clean(self) -> np.ndarray:
        """Clean rewards [prompts, candidates, steps, rewards]; NaN in prompts not yet recorded."""
        return _read(self._array("clean"), self.path)

    @functools.cached_property
    def aware(self) -> np.ndarray:
        """Noise-aware rewards [prompts, candidates, steps, rewards]; NaN where there are none."""
        return _read(self._array("aware"), self.path)

    @functools.cached_property
    def seeds(self) -> IntArray:
        """Seed of each candidate [prompts, candidates], -1 where unknown."""
        return _read(self._array("seed"), self.path)

    @property
    def done(self) -> BoolArray:
        """Which prompts are recorded [prompts]."""
        return np.asarray(~np.isnan(self.clean[:, :, -1]).all(axis=(1, 2)))

    def shown_by(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [rewards] by which results are shown; see `scales`."""
        pairs = np.array([self.scales.get(name, (0.0, 1.0)) for name in self.rewards])
        return pairs[:, 0], pairs[:, 1]

    def recorded(self) -> IntArray:
        """Indices of the prompts that are recorded.

        Raises:
            ValueError: none is.
        """
        indices = np.flatnonzero(self.done)
        if not len(indices):
            raise ValueError(f"recording {self.path} holds no prompt yet")
        return indices

    def guide(self, kind: str = "aware", prompts: IntArray | None = None) -> np.ndarray:
        """What a policy sees [prompts, candidates, steps, rewards], each step contiguous.

        The finished image is always judged by the clean reward.

        Args:
            kind: `aware`: noise-aware rewards where there are any, else clean ones; `clean`: clean ones.
            prompts: indices of recorded prompts (default: all recorded).
        """
        if kind not in ("aware", "clean"):
            raise ValueError(f"a guide is `aware` or `clean`, got {kind!r}")
        prompts = self.recorded() if prompts is None else prompts
        by_step = np.empty((self.shape[2], len(prompts), self.shape[1], self.shape[3]), dtype=self.clean.dtype)
        for step in range(self.shape[2]):
            by_step[step] = self.clean[prompts, :, step]
            if kind == "aware" and step < self.shape[2] - 1:
                aware = self.aware[prompts, :, step]
                np.copyto(by_step[step], aware, where=~np.isnan(aware))
        return np.moveaxis(by_step, 0, 2)

    @property
    def has_aware(self) -> bool:
        """Whether there is any noise-aware reward."""
        return bool(np.isfinite(self.aware[self.recorded()[0]]).any())

    @property
    def dataset(self) -> xr.Dataset:
        """The recorded prompts as an xarray dataset with dims (prompt, candidate, step, reward)."""
        import xarray as xr

        done = self.recorded()
        return xr.Dataset(
            {
                "clean": (DIMS, self.clean[done]),
                "aware": (DIMS, self.aware[done]),
                "seed": (DIMS[:2], self.seeds[done]),
                "sigma": (DIMS[2:3], self.sigmas),
            },
            coords={
                "prompt": [self.prompts[index] for index in done],
                "candidate": np.arange(self.shape[1]),
                "step": np.arange(1, self.shape[2] + 1),
                "reward": list(self.rewards),
            },
            attrs={"scales": self.scales, "provenance": self.provenance},
        )

    def __repr__(self) -> str:
        sizes = " x ".join(f"{size} {dim}s" for size, dim in zip(self.shape, DIMS, strict=True))
        return f"<Recording {self.path}: {sizes} ({', '.join(self.rewards)}), {int(self.done.sum())} prompts recorded>"

    def _check(self, attributes: dict[str, Any]) -> None:
        """Attributes and array shapes fit together; ValueError otherwise."""
        path = self.path
        if attributes.get("format") != FORMAT:
            raise ValueError(f"{path} is not a ttsnap recording (its zarr attribute `format` is not {FORMAT!r})")
        if attributes.get("version") != VERSION:
            raise ValueError(f"recording {path} has version {attributes.get('version')}; this ttsnap reads {VERSION}")
        for key in ("prompts", "rewards"):
            names = attributes.get(key)
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"recording {path} has no list of {key}")
        for name, dims in _ARRAYS.items():
            try:
                found = self._array(name).metadata.dimension_names
            except KeyError:
                raise ValueError(f"recording {path} lacks its array `{name}`") from None
            except Exception as error:  # whatever strange metadata make the codecs raise
                raise ValueError(f"array `{name}` of recording {path} is damaged: {_first_line(error)}") from error
            if tuple(found or ()) != dims:
                raise ValueError(f"array `{name}` of recording {path} must have dims {dims}, got {found}")
        shape = self._array("clean").shape
        expected = {name: tuple(shape[DIMS.index(dim)] for dim in dims) for name, dims in _ARRAYS.items()}
        for name, size in expected.items():
            if self._array(name).shape != size:
                raise ValueError(
                    f"array `{name}` of recording {path} must have shape {size} as `clean` has {shape}, "
                    f"got {self._array(name).shape}"
                )
        for axis, key in ((0, "prompts"), (3, "rewards")):
            if len(attributes[key]) != shape[axis]:
                raise ValueError(f"recording {path} names {len(attributes[key])} {key} but holds {shape[axis]}")

    def _check_rewards(self) -> None:
        """Every candidate of a recorded prompt has its finished image's reward; ValueError otherwise."""
        final = self.clean[:, :, -1]
        wrong = ~np.isfinite(final) & self.done[:, None, None]
        if wrong.any():
            prompt, candidate, reward = np.argwhere(wrong)[0]
            raise ValueError(
                f"recording {self.path} has {self.rewards[reward]} {final[prompt, candidate, reward]:g} for the "
                f"finished image of candidate {candidate} of prompt {self.prompts[prompt]!r}; it must be finite"
            )


def _open_group(path: AnyPath) -> Any:
    import zarr

    if not path.exists():
        raise ValueError(f"there is no recording at {path}")
    if not (path / "zarr.json").is_file():
        raise ValueError(f"{path} is not a ttsnap recording (it has no zarr.json)")
    try:
        if isinstance(path, Remote):
            url = str(path)
            return patiently(lambda: zarr.open_group(url, mode="r+", zarr_format=3, storage_options=options(url)), url)
        return zarr.open_group(path, mode="r+" if os.access(path, os.W_OK) else "r", zarr_format=3)
    except Exception as error:
        raise ValueError(f"recording {path} cannot be opened: {_first_line(error)}") from error


def _asked(what: Callable[[], Any], path: AnyPath) -> Any:
    """An answer of the storage, for which a remote one is asked patiently."""
    return patiently(what, str(path)) if isinstance(path, Remote) else what()


def _read(array: Any, path: AnyPath) -> np.ndarray:
    try:
        return np.asarray(_asked(lambda: array[:], path))
    except Exception as error:  # whatever a broken chunk makes the codecs raise
        raise ValueError(f"array `{array.basename}` of recording {path} is damaged: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
