"""Which checkpoints stay, and the link to the best one."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint.files import fsync_directory, remove_tree
from trainer.checkpoint.format import step_directories, step_name

BEST = "best"


def link_best(directory: Path, step: int, attempt: str) -> None:
    """Point ``directory/best`` at a committed step, replacing an earlier link in one instant."""
    aside = directory / f".{BEST}.{attempt}-0.tmp"
    aside.unlink(missing_ok=True)
    aside.symlink_to(step_name(step))  # relative: the run directory can be moved
    aside.replace(directory / BEST)
    fsync_directory(directory)


def surplus(directory: Path, step: int, keep_last: int, keep_every: int) -> list[Path]:
    """Steps older than the newly committed ``step`` that no rule keeps; the oldest first."""
    link = directory / BEST
    best = link.readlink().name if link.is_symlink() else None
    older = [(number, path) for number, path in step_directories(directory) if number < step]
    return [
        path
        for number, path in reversed(older[keep_last - 1 :])
        if not (keep_every and number % keep_every == 0) and path.name != best
    ]


def hide(path: Path) -> Path:
    """Take a checkpoint out of sight in one instant; the caller removes what is returned.

    A crash halfway through the removal then leaves no torn checkpoint behind.
    """
    hidden = path.with_name(f".{path.name}.removed-0.tmp")
    remove_tree(hidden)
    path.rename(hidden)
    return hidden
