"""Standard output that may go away: a closed terminal, a lost connection, or `| head` must not end a run."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class _Forgiving:
    """A stream whose reader may leave; from then on what is written is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        # What the buffer holds goes there too, instead of failing again at the end of the process.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def forgive_closed_output() -> None:
    """Let this process go on when nobody reads what it prints any more. Harmless to repeat."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Forgiving):
            setattr(sys, name, _Forgiving(stream))
