"""`generate --from FILE`: options that are not given are those with which a picture was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts.config import Dict

if TYPE_CHECKING:
    from cyclopts import App, ArgumentCollection

    from ttsnap.live.settings import ModelSettings
    from ttsnap.pipelines.conditions import Pictures

INSTEAD = {  # an option that is given takes the place of these of the picture
    "budget": ("candidates",),
    "rungs": ("policy",),
    "keep": ("policy",),
    "stop_at": ("policy",),
    "diversity": ("diversity_options",),
    "reward": ("weights",),
}


@dataclass(frozen=True)
class Defaults:
    """What options are where they are not given: those of a picture that is named, else those of the settings file."""

    file: Dict

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Fill in what was not given."""
        named = {argument.name.lstrip("-").replace("-", "_"): argument for argument in arguments}
        source = named.get("from")
        if source is None or not source.tokens:
            self.file(app, commands, arguments)
            return
        picture = source.tokens[0].value
        given = {name for name, argument in named.items() if argument.tokens}
        dropped = {other for name in given for other in INSTEAD.get(name, ())}
        options = {
            name.replace("_", "-"): value for name, value in read(Path(picture)).items() if name not in dropped | given
        }
        for command in reversed(commands):
            options = {command: options}
        Dict(options, source=picture)(app, commands, arguments)


def read(picture: Path) -> dict[str, Any]:
    """The options of `ttsnap generate` with which a picture was made.

    Raises:
        ValueError: it does not say.
    """
    from ttsnap.live.rerun import options

    return options(_own(picture))


def recipe(picture: Path, model: ModelSettings, pictures: Pictures) -> Mapping[str, Any]:
    """What a picture says of itself, where everything that it was made with is at hand.

    Raises:
        ValueError: it was made with files that have to be named again.
    """
    from ttsnap.live.settings import fingerprint

    own = _own(picture)
    given = set(pictures.given())
    now = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(model).items()}
    given |= {name for name, value in now.items() if value != own["settings"].get(name)}
    if missing := [name for name in own.get("local", ()) if name not in given]:
        names = {"mask_image": "mask"}  # an object that a library was given, by the argument's name
        wanted = ", ".join(f"--{names.get(name, name).replace('_', '-')}" for name in missing)
        raise ValueError(f"{picture} was made with files that it only knows by name; say where they are with {wanted}")
    known, path = own.get("contents", {}).get("model"), Path(model.model)
    if known and path.exists() and fingerprint(path) != known:
        from ttsnap.cli.progress import say

        say(f"note: {picture} was made with other model files than those of {path}")
    return own


def _own(picture: Path) -> Mapping[str, Any]:
    from ttsnap.files import metadata

    own = metadata.read(picture).own
    if own is None:
        raise ValueError(
            f"{picture} was not made by ttsnap, or its metadata was cut; `ttsnap show` prints what it says"
        )
    return own


__all__ = ["Defaults", "read", "recipe"]
