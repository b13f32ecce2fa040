"""Ctrl-C as a request to stop where nothing is lost."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

__all__ = ["StopRequest", "Stopped", "stoppable"]


class Stopped(Exception):
    """A run ends here because a stop was requested."""


class StopRequest:
    """Set by Ctrl-C or a termination signal, so that a run stops between two steps."""

    def __init__(self) -> None:
        self.is_set = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True


@contextlib.contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C into a request; a second one interrupts at once."""
    request = StopRequest()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, request) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
