"""Signals that ask a worker to save and leave."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1 is what Slurm can send ahead of a job's time limit (``--signal``)."""


class StopSignal:
    """Remembers that a stop was asked for; the ranks agree on it before each step (trainer/step.py)."""

    def __init__(self) -> None:
        self._asked: int | None = None

    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._asked is not None

    def cause(self) -> str | None:
        """The signal that asked first."""
        return None if self._asked is None else signal.Signals(self._asked).name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked = number

    def listen(self) -> None:
        """Handle the signals from here to the end of the process: one that comes late, while the process
        leaves, must not turn a saved run into a killed one."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # a forked worker comes with them blocked
