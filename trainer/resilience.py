"""Signals that ask a worker to save and leave."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm can send ahead of a job's time limit (``--signal``)."""


class StopSignal:
    """Remembers that a stop was asked for; the ranks agree on it before each step (trainer/step.py)."""

    def __init__(self) -> None:
        self._asked = False

    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; what they did before is put back at the end."""
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
