"""How a command ends. Imports nothing, so that help and completion stay instant."""

from __future__ import annotations

from dataclasses import dataclass

EXIT_DONE = 0
EXIT_CONFIG = 2
"""A config or input error."""
EXIT_GAVE_UP = 70
"""The restart budget is spent, or no restart would mend it."""
EXIT_STOPPED = 75
"""Stopped, and resumable."""


@dataclass(frozen=True)
class Outcome:
    """The command's exit code and what to tell the user last."""

    code: int
    message: str = ""
