"""metrics.jsonl and events.jsonl: appended a line at a time, readable while they grow and after a kill.

A line is written by one system call on a file opened for appending, so that several processes may write
events and a killed one leaves at most one torn line, at the end.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from trainer.metrics.schema import EVENTS_FILE, METRICS_FILE, Record, check_event, check_record

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(record: Mapping[str, Any]) -> bytes:
    """One JSON line. Tensors and arrays become lists; NaN and infinities, which JSON lacks, strings."""
    return json.dumps(_plain(record), allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def decode(line: bytes) -> Record | None:
    """The record of a line, None if it is torn. Undoes ``encode``'s strings in values and in lists."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    return {key: _restore(value) for key, value in record.items()}


def _restore(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    return [_restore(item) for item in value] if isinstance(value, list) else value


class JsonlWriter:
    """Appends records to a file; the directory must exist.

    Opening removes the torn last line that a killed writer may have left, so that a new line never joins it.

    Args:
        path: the file, made if missing.
        check: called with each record before it is written; raises on a record that must not be.

    Raises:
        OSError: from any method, as the file system gives it (no space left, no permission). A line that
            was only written in part is ended, and the next call starts a line of its own.
    """

    def __init__(self, path: Path, check: Callable[[Mapping[str, Any]], None] | None = None) -> None:
        self.path = path
        self._check = check
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._torn = False
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.ftruncate(self._fd, data.rfind(b"\n") + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        if self._check is not None:
            self._check(record)
        line = b"\n" * self._torn + encode(record)
        written = os.write(self._fd, line)
        # A short write means that the disk is full; the rest raises what it is full of.
        self._torn = written < len(line)
        if self._torn:
            os.write(self._fd, line[written:])
            self._torn = False

    def truncate_after(self, step: int) -> int:
        """Drop the records of later steps, which a resume at ``step`` will compute again.

        The file is rewritten aside and renamed, so that a reader sees the old or the new one; on a disk that
        is too full for that, it is cut where all of them come last.

        Returns:
            How many records were dropped.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if (record := decode(line)) and record.get("step", 0) <= step]
        if len(kept) == len(lines):
            return 0
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with aside.open("wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self.path)
        except OSError:
            aside.unlink(missing_ok=True)
            if lines[: len(kept)] != kept:
                raise
            os.ftruncate(self._fd, sum(map(len, kept)))
            return len(lines) - len(kept)
        os.close(self._fd)
        self._open()
        return len(lines) - len(kept)

    def close(self) -> None:
        """Close the file; every line written is already with the operating system."""
        os.close(self._fd)

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def metrics_writer(run_dir: Path) -> JsonlWriter:
    """The checked writer of a run's metrics.jsonl."""
    return JsonlWriter(run_dir / METRICS_FILE, check_record)


def events_writer(run_dir: Path) -> JsonlWriter:
    """The checked writer of a run's events.jsonl."""
    return JsonlWriter(run_dir / EVENTS_FILE, check_event)


def read_metrics(path: Path) -> list[Record]:
    """All whole records of a metrics.jsonl, of a step logged twice the last; [] if there is no file."""
    records = read_records(path)
    last = {record.get("step"): index for index, record in enumerate(records)}
    return [record for index, record in enumerate(records) if last[record.get("step")] == index]


def read_events(path: Path) -> list[Record]:
    """All whole records of an events.jsonl in the order of their times; [] if there is no file."""
    return sorted(read_records(path), key=lambda event: event.get("time", 0.0))


def read_records(path: Path) -> list[Record]:
    """All whole records of a JSONL file, in order; [] if there is no file."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    # What follows the last newline is empty or torn.
    return list(_records(lines[:-1], path))


def _records(lines: Iterable[bytes], path: Path) -> Iterable[Record]:
    for number, line in enumerate(lines, start=1):
        record = decode(line)
        if record is not None:
            yield record
        elif line.strip():
            warnings.warn(f"{path}:{number}: not a JSON object, skipped", stacklevel=3)


class Follow:
    """Reads a growing JSONL file: each ``poll`` returns the records that came since the last one.

    The file may not exist yet, may end in half a line, and may be replaced by ``truncate_after``: what it
    then shares with the lines already read is not returned again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._offset = 0
        # One hash a line: truncate_after keeps a prefix, and this is how it is known again.
        self._seen = array("q")

    def poll(self) -> list[Record]:
        """New whole records, in order; [] if there are none."""
        lines: list[bytes] = []
        if self._file is None or self._replaced(self._file):
            try:
                file = self.path.open("rb")
            except FileNotFoundError:
                return []
            self.close()
            self._file, self._offset = file, 0
            lines = self._skip_known(self._whole_lines(file))
        else:
            lines = self._whole_lines(self._file)
        self._seen.extend(hash(line) for line in lines)
        return list(_records(lines, self.path))

    def _replaced(self, file: BinaryIO) -> bool:
        # The open file keeps its inode from being given to another one.
        mine = os.fstat(file.fileno())
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return False
        return (now.st_dev, now.st_ino) != (mine.st_dev, mine.st_ino) or now.st_size < self._offset

    def _whole_lines(self, file: BinaryIO) -> list[bytes]:
        file.seek(self._offset)
        data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        return data.splitlines()

    def _skip_known(self, lines: list[bytes]) -> list[bytes]:
        known = 0
        while known < min(len(lines), len(self._seen)) and hash(lines[known]) == self._seen[known]:
            known += 1
        del self._seen[known:]
        return lines[known:]

    def close(self) -> None:
        """Release the file; a later ``poll`` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None
