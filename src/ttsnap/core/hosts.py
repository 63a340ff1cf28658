"""Who may ask a server of this machine: names it is reached by, and pages of other sites.

A page of another site that is open in a browser on this machine can reach 127.0.0.1. It cannot leave out its `Origin`,
and where it has its own name point here (DNS rebinding), the `Host` tells.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether an address or name is this machine's own, which no other machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def foreign_host(listens: str, headers: Mapping[str, str], allowed: Collection[str] = ()) -> str | None:
    """The name that a request calls this machine by, where that is not one of its own; None where it is.

    Args:
        listens: address that the server listens on; others than this machine's own are reached by any name.
        headers: of the request, names in small letters.
        allowed: other names.
    """
    host = urlsplit("//" + headers.get("host", "")).hostname or ""
    known = {name.lower() for name in (listens, *allowed)}
    return host if is_loopback(listens) and not (is_loopback(host) or host in known) else None


def foreign_origin(headers: Mapping[str, str], allowed: Collection[str] = ()) -> str | None:
    """The origin of a page of another site that asks; None where the server itself, or nobody, is named."""
    origin = headers.get("origin", "").rstrip("/").lower()
    known = {name.rstrip("/").lower() for name in allowed}
    own = urlsplit(origin).netloc == headers.get("host", "").lower()
    return None if not origin or own or origin in known else origin
