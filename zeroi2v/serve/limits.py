"""What a request may ask for, and how it is refused."""

from __future__ import annotations

from dataclasses import dataclass


class Refused(ValueError):
    """A request that can't be answered; the message is one line for the person who asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request may ask for."""

    megabytes: float = 200
    """Size of an upload, in 10^6 bytes."""
    minutes: float = 60
    """Length of a video, by its header and by its packets."""
    megapixels: float = 9
    """Width x height of a frame, in 10^6 pixels."""
    seconds: float = 120
    """Of computing; after that the request is ended, wherever it is."""
    queue: int = 16
    """Requests that may wait; another one is refused."""

    def __post_init__(self):
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"--max-{name} must be positive: got {getattr(self, name):g}")
