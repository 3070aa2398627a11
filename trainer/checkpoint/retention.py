"""Which checkpoints stay, and the link to the best one."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint.files import StorageError, fsync_directory, remove_tree
from trainer.checkpoint.format import InvalidCheckpoint, read_manifest, step_directories, step_name
from trainer.checkpoint.shards import file_fault

BEST = "best"


def link_best(directory: Path, step: int, attempt: str) -> None:
    """Point ``directory/best`` at a committed step, replacing an earlier link in one instant."""
    aside = directory / f".{BEST}.{attempt}-0.tmp"
    aside.unlink(missing_ok=True)
    aside.symlink_to(step_name(step))  # relative: the run directory can be moved
    aside.replace(directory / BEST)
    fsync_directory(directory)


def surplus(directory: Path, step: int, keep_last: int, keep_every: int) -> list[tuple[int, Path]]:
    """Steps older than the newly committed ``step`` that no rule keeps; the oldest first."""
    link = directory / BEST
    best = link.readlink().name if link.is_symlink() else None
    older = [(number, path) for number, path in step_directories(directory) if number < step]
    return [
        (number, path)
        for number, path in reversed(older[keep_last - 1 :])
        if not (keep_every and number % keep_every == 0) and path.name != best
    ]


def check_stored(directory: Path) -> None:
    """Re-read a committed checkpoint from the disk against its checksums.

    Raises:
        StorageError: what the disk returns is not what was written.
    """
    try:
        for name, entry in read_manifest(directory).files.items():
            if fault := file_fault(directory / name, entry.bytes, entry.checksum, from_disk=True):
                raise InvalidCheckpoint(directory / name, fault)
    except InvalidCheckpoint as error:
        raise StorageError(
            "checkpoint",
            error.path,
            f"read back after the commit, it {error.reason}; older checkpoints were kept",
            "check the disk; set run.root to another one",
        ) from error


def hide(path: Path) -> Path:
    """Take a checkpoint out of sight in one instant; the caller removes what is returned.

    A crash halfway through the removal then leaves no torn checkpoint behind.
    """
    hidden = path.with_name(f".{path.name}.removed-0.tmp")
    remove_tree(hidden)
    path.rename(hidden)
    return hidden
