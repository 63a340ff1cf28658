"""Recorded rewards: what every candidate would have been worth after every call."""

from __future__ import annotations

from ttsnap.recordings.recording import Recording

__all__ = ["Recording"]
