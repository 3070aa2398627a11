"""Whose memory it is: a run's folder under the memory mount, held while its workers live.

    <memory_dir>/muster-<uid>/<run>-<key>/
      lease                      held with a shared flock by every worker of the run on this machine
      rank-00000.slot-0 …        snapshots of a rank (trainer/checkpoint/slots.py)
      rank-00000.log-0 …         what its steps since were given (trainer/checkpoint/updates.py)
      peer-00001.slot-0 …        copies of other nodes' ranks (trainer/checkpoint/peer.py)

A run that was killed or gave up leaves it for its restart. It is removed by the next start of another run on this
machine once nobody holds it and it is of no use: the run has ended, its directory is gone, the machine was started
again, or it has lain idle for ten minutes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from parallel.errors import ConfigError
from trainer.checkpoint.files import remove_tree
from trainer.metrics.jsonl import read_events
from trainer.metrics.schema import EVENTS_FILE

_LEASE = "lease"
_IDLE_SECONDS = 600.0
_DEFAULT_MOUNT = "/dev/shm"
_BLOCK_BYTES = 512


def memory_folder(memory_dir: str | None, run_dir: Path) -> Path:
    """Where the snapshots of a run are on this machine."""
    path = str(run_dir.absolute())
    readable = re.sub(r"[^A-Za-z0-9_-]", "-", f"{run_dir.parent.name}-{run_dir.name}")[:64]
    return memory_base(memory_dir) / f"{readable}-{xxhash.xxh3_64_hexdigest(path.encode())}"


def memory_base(memory_dir: str | None) -> Path:
    """Where the snapshots of all runs of this user are on this machine."""
    return Path(memory_dir or _DEFAULT_MOUNT) / f"muster-{os.getuid()}"


@dataclass(frozen=True)
class Kept:
    """The snapshots of one run on this machine.

    Attributes:
        run_dir: None: not written down yet.
        bytes: of memory that they take.
        held: whether workers of the run live.
    """

    folder: Path
    run_dir: Path | None
    bytes: int
    held: bool

    def __str__(self) -> str:
        return f"{self.bytes / (1 << 20):,.0f} MiB of memory in {self.folder}"


def kept(folder: Path) -> Kept | None:
    """What lies in a run's folder; None: nothing."""
    try:
        descriptor = os.open(folder / _LEASE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except BlockingIOError:
            held = True
        size = 0
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # removed meanwhile
                size += path.stat().st_blocks * _BLOCK_BYTES
        text = os.pread(descriptor, 1 << 16, 0)
    finally:
        os.close(descriptor)
    run_dir = None
    with suppress(ValueError):  # it is being written
        run_dir = Path(json.loads(text)["run_dir"])
    return Kept(folder, run_dir, size, held)


class Lease:
    """Holds a run's folder until the process ends or :meth:`release`.

    Args:
        folder: from :func:`memory_folder`; made if missing.
        run_dir: of the run.

    Raises:
        ConfigError: the folder cannot be made, or belongs to somebody else.
    """

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.folder = folder
        try:
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.parent.stat().st_uid != os.getuid():
                raise PermissionError(f"{folder.parent} belongs to another user")
            self._descriptor = _hold(folder)
        except OSError as error:
            raise ConfigError(
                "checkpoint.memory_dir",
                folder.parent.parent,
                f"snapshots cannot be kept there: {error.strerror or error}",
                "checkpoint.memory_dir=FOLDER of a memory mount, or checkpoint.memory_every=0",
            ) from error
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"boot": _boot(), "run_dir": str(run_dir)}).encode(), 0)

    def touch(self) -> None:
        """The run is at work."""
        os.utime(self._descriptor)

    def release(self) -> None:
        """Let go; the last one to do so removes the folder, if no slots are left in it."""
        with suppress(BlockingIOError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if [path.name for path in self.folder.iterdir()] == [_LEASE]:
                (self.folder / _LEASE).unlink()
                self.folder.rmdir()
        os.close(self._descriptor)


def _hold(folder: Path) -> int:
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(folder / _LEASE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # removed between the two lines
            continue
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # a cleaner had it first


def clean(base: Path, own: Path) -> list[Path]:
    """Remove the folders of other runs that are of no use any more.

    Returns:
        What was removed.
    """
    removed = []
    for folder in sorted(base.iterdir()) if base.is_dir() else ():
        if folder == own:
            continue
        try:
            descriptor = os.open(folder / _LEASE, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # not made yet, or just removed
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_abandoned(descriptor):
                remove_tree(folder)
                removed.append(folder)
        except BlockingIOError:
            pass  # its workers live
        finally:
            os.close(descriptor)
    return removed


def _is_abandoned(descriptor: int) -> bool:
    if time.time() - os.fstat(descriptor).st_mtime > _IDLE_SECONDS:
        return True
    try:
        owner = json.loads(os.pread(descriptor, 1 << 16, 0))
    except ValueError:
        return False  # being written by a worker that is about to hold it; else it is idle soon
    run_dir = Path(owner["run_dir"])
    if owner["boot"] != _boot() or not run_dir.is_dir():
        return True
    marks = ("start", "stop", "finish")
    ends = [event["event"] for event in read_events(run_dir / EVENTS_FILE) if event.get("event") in marks]
    return bool(ends) and ends[-1] != "start"


def _boot() -> str:
    """What changes when the machine is started again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
