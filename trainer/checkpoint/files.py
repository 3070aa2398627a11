"""Durable small steps on a file system, and what goes wrong with it said as an error a user can act on."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from parallel.errors import ConfigError

_FULL = (errno.ENOSPC, errno.EDQUOT)


class StorageError(ConfigError):
    """A checkpoint or a file beside it could not be stored; what was committed before is untouched.

    Attributes:
        rank, host: where it happened, if that was another process; None: here.
    """

    kind = "storage"
    rank: int | None = None
    host: str | None = None


def storage_error(error: OSError, path: Path, bytes_needed: int, field: str = "checkpoint") -> StorageError:
    """What a failed write of ``bytes_needed`` bytes under ``path`` means to the user."""
    if error.errno in _FULL:
        return StorageError(
            field,
            path,
            f"the disk is full: {bytes_needed:,} bytes needed, {_free(path):,} bytes free",
            "free space there, lower checkpoint.keep_last, or set run.root to a larger disk",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        relation, fix = "writing is not permitted", "give this user write permission, or set run.root"
    elif error.errno == errno.EROFS:
        relation, fix = "the file system is read-only", "mount it writable, or set run.root"
    else:
        relation = f"the file system failed: {error.strerror or error}"
        fix = "check the disk or network mount, or set run.root to another one"
    return StorageError(field, error.filename or path, relation, fix)


def check_writable(directory: Path) -> None:
    """Make the directory if needed and prove that a file can be created and removed in it.

    Raises:
        ConfigError: it cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"muster")
            probe.flush()
    except OSError as error:
        raise ConfigError(
            "run.root",
            directory,
            f"the run directory must be writable: {error.strerror or error}",
            "choose another run.root, or give this user write permission",
        ) from error


def check_room(directory: Path, bytes_needed: int) -> None:
    """Check that ``bytes_needed`` bytes fit on the disk of ``directory`` (which need not exist yet).

    Raises:
        ConfigError: they do not.
    """
    free = _free(directory)
    if free < bytes_needed:
        raise ConfigError(
            "run.root",
            directory,
            f"a checkpoint needs {bytes_needed:,} bytes, {free:,} bytes are free there",
            "free space, lower checkpoint.keep_last, or set run.root to a larger disk",
        )


def _free(path: Path) -> int:
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def fsync_directory(directory: Path) -> None:
    """Make the directory's entries (creations, renames, removals) durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems keep directories synchronous and refuse the call.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file so that it is there in whole, under its name, or not at all."""
    aside = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}-0.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def remove_tree(directory: Path) -> None:
    """Remove a directory that another process may be removing or filling as well; best effort."""
    shutil.rmtree(directory, ignore_errors=True)
