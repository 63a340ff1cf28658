"""Options of `ttsnap serve`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ttsnap.core.hosts import is_loopback

KEYS = "TTSNAP_API_KEY"  # keys in the environment, separated by commas
SHORTEST_KEY = 8
MOST_PICTURES = 10  # of one request, as in OpenAI's API


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Where the server listens, who may use it, and how much.

    Attributes:
        host: Address to listen on; 127.0.0.1: only this machine.
        port: Port; 0: any free one.
        api_key: Key that clients must give; may be repeated (or TTSNAP_API_KEY, separated by commas).
        insecure: Let other machines in without a key.
        allow_host: Another name by which this server is reached, such as that of a proxy; may be repeated.
        allow_origin: Origin of a web page that may ask this server, such as https://example.org; may be repeated.
        alias: Another name of the model, for clients that know only such as gpt-image-1; may be repeated.
        max_waiting: Most pictures asked for at a time, by all clients; then the answer is 503.
        max_per_client: Most of them by one key, or without keys by one address; then the answer is 429.
        max_candidates: Most candidates of one search.
        max_steps: Most denoiser calls of a finished image.
        max_size: Largest image side in pixels.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: tuple[str, ...] = ()
    insecure: bool = False
    allow_host: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()
    alias: tuple[str, ...] = ()
    max_waiting: int = 128
    max_per_client: int = 64
    max_candidates: int = 256
    max_steps: int = 200
    max_size: int = 2048

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be 1 to 65535, or 0 for any free one, got {self.port}")
        for name in ("max_candidates", "max_steps", "max_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("max_waiting", "max_per_client"):
            if getattr(self, name) < MOST_PICTURES:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least {MOST_PICTURES}, as one request may ask for so many "
                    f"pictures, got {getattr(self, name)}"
                )
        if any(len(key) < SHORTEST_KEY or not key.isascii() or key.split() != [key] for key in self.keys):
            raise ValueError(f"an API key has at least {SHORTEST_KEY} ASCII characters and no spaces")
        if not (is_loopback(self.host) or self.keys or self.insecure):
            raise ValueError(
                f"--host {self.host} lets other machines in: give an --api-key, or --insecure if everybody who reaches "
                "it may use it"
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the option and of the environment."""
        return (*self.api_key, *filter(None, (key.strip() for key in os.environ.get(KEYS, "").split(","))))
