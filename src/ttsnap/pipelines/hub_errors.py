"""Why a model could not be loaded, from the hub or a directory: one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ttsnap.pipelines.single_file import first_line


def explain(model: str, error: BaseException, what: str = "model") -> str:
    """One sentence about why a model (or `what` it is) could not be loaded, and what to do."""
    from huggingface_hub import constants, errors

    chain = list(_chain(error))

    def met(*kinds: type[BaseException]) -> Any:
        return next((one for one in chain if isinstance(one, kinds)), None)

    def status() -> int | None:
        codes = (getattr(getattr(one, "response", None), "status_code", None) for one in chain)
        return next((code for code in codes if code), None)

    if met(errors.GatedRepoError) or status() == 403:
        return (
            f"{what} {model!r} is gated: accept its terms on its page on the hub, then log in with `hf auth login` or "
            "set HF_TOKEN"
        )
    if met(errors.RepositoryNotFoundError) or status() == 401:
        return (
            f"there is no {what} {model!r} on the hub, or it is private: check the name, or log in with `hf auth login`"
        )
    if met(errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError) or status() == 404:
        return f"{what} {model!r} on the hub is no diffusers pipeline: it lacks a file such as model_index.json"
    if (code := status()) is not None and code >= 429:
        return f"the hub answers {code} for {what} {model!r}; try again later, or give a local directory"
    text = " ".join(str(one) for one in chain)
    absent = met(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) and model.endswith(".safetensors")
    if not absent and "safetensors" in text and "not" in text and "find" in text:
        return (
            f"{what} {model!r} has no safetensors weights, only pickles, which can run code; choose another copy of it"
        )
    if Path(model).exists():  # then no hub is at fault
        return f"cannot load {what} {model!r}: {first_line(error)}"
    offline = met(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE
    if offline or met(errors.LocalEntryNotFoundError, ConnectionError) or _is_connection(chain):
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        return f"{what} {model!r} is not on this machine and {why}; connect, or give the directory of a copy"
    return f"cannot load {what} {model!r}: {first_line(error)}"


def _is_connection(chain: Sequence[BaseException]) -> bool:
    return any(type(one).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError") for one in chain)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
