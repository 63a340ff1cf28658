"""One sentence for an error."""

from __future__ import annotations

import errno

_EXTRAS = {"gradio": "app"}
_EXTRAS |= dict.fromkeys(("fastapi", "uvicorn", "prometheus_client", "multipart"), "serve")
_EXTRAS |= dict.fromkeys(("ray", "fsspec", "s3fs"), "cluster")
_NO_MEMORY = (
    "Cannot allocate memory",
    "can't allocate memory",
    "not enough memory",
    "could not create a primitive",
    "failed to map segment",  # of a library that is loaded late
)


def explain(error: Exception) -> str:
    """One sentence for an error; a missing extra names its install command."""
    if isinstance(error, ModuleNotFoundError):
        extra = _EXTRAS.get(error.name or "")
        extra = extra or ("replay" if error.name in ("xarray", "zarr", "pandas", "optuna", "yaml") else "diffusion")
        return f"{error.name} is not installed; it comes with: pip install 'ttsnap[{extra}]'"
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read"
    if (isinstance(error, MemoryError) and not str(error)) or any(sign in str(error) for sign in _NO_MEMORY):
        return "memory ran out; fewer candidates, a smaller --max-batch or a smaller --size need less"
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            said += "; what is stored is whole, and with more room the same command goes on from it"
        return said
    return " ".join(str(error).split()) or type(error).__name__
