"""Lines that a file system refuses are kept in memory and written, in their order, when it takes them again.

A full disk under the logs then costs neither the run nor a line of its history.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint.files import StorageError, storage_error
from trainer.metrics.jsonl import JsonlWriter, decode, encode

LIMIT_BYTES = 64 << 20
"""Most that one file may hold back."""


class PatientWriter(JsonlWriter):
    """A :class:`JsonlWriter` whose ``write`` does not fail while the disk is full or fails.

    What waits is tried again with every later line and by ``flush``.

    Args:
        path, check: of the JsonlWriter.
        on_refusal: called with the file and the reason when lines begin to wait.
        on_relief: called with the file and their number when all that waited was written.
        limit_bytes: most that may wait.
    """

    def __init__(
        self,
        path: Path,
        check: Callable[[Mapping[str, Any]], None] | None,
        on_refusal: Callable[[Path, str], None],
        on_relief: Callable[[Path, int], None],
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        super().__init__(path, check)
        self._on_refusal, self._on_relief, self.limit_bytes = on_refusal, on_relief, limit_bytes
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._refused: OSError | None = None
        self._num_held = 0

    @property
    def num_waiting(self) -> int:
        """Lines that are not in the file yet."""
        return len(self._waiting)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, or keep it for later.

        Raises:
            StorageError: more than ``limit_bytes`` wait; the oldest are still there.
        """
        if self._check is not None:
            self._check(record)
        line = encode(record)
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self.flush()
        if self._refused is not None and self._waiting_bytes > self.limit_bytes:
            raise self.error()

    def flush(self) -> bool:
        """Write what waits; whether nothing waits any more."""
        try:
            while self._waiting:
                self._append_whole(self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())
        except OSError as error:
            first, self._refused = self._refused is None, error
            self._num_held = max(self._num_held, len(self._waiting))
            if first:
                self._on_refusal(self.path, error.strerror or str(error))
            return False
        if self._refused is not None:
            held, self._refused, self._num_held = self._num_held, None, 0
            self._on_relief(self.path, held)
        return True

    def error(self) -> StorageError:
        """What to tell the user of lines that could not be written."""
        assert self._refused is not None
        said = storage_error(self._refused, self.path, self._waiting_bytes, field="run.root")
        lines = f"{len(self._waiting)} line{'' if len(self._waiting) == 1 else 's'} of {self.path.name}"
        return StorageError(said.field, self.path, f"{lines} could not be written: {said.relation}", said.fix)

    def _append_whole(self, line: bytes) -> None:
        """Append a line, or nothing of it: what a full disk took of its beginning is taken back."""
        start = b"\n" * self._torn
        rest = start + line
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            written = len(start) + len(line) - len(rest)
            end = os.lseek(self._fd, 0, os.SEEK_CUR)
            if written and os.fstat(self._fd).st_size == end:
                os.ftruncate(self._fd, end - written)
            elif written:  # another process has appended behind it
                self._torn = True
            raise
        self._torn = False

    def truncate_after(self, step: int) -> int:
        """Drop the records of later steps, of those that wait as well."""
        kept = deque(line for line in self._waiting if (decode(line) or {}).get("step", 0) <= step)
        dropped = len(self._waiting) - len(kept)
        self._waiting, self._waiting_bytes = kept, sum(map(len, kept))
        return dropped + super().truncate_after(step)
