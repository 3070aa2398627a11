"""The durable tier: sharded checkpoints on a file system, written behind training.

    training thread    save: copy owned slices to host memory ─┐ returns
    writer thread                                              └ write shard → commit → best → retention

At most one save is in flight; the next one waits for it and raises what went wrong with it, unless that was
taken before (:mod:`trainer.checkpoint.failed`).
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel.engines.base import StateSlice
from parallel.errors import ConfigError
from trainer import faults
from trainer.checkpoint.commit import (
    Attempt,
    abandon,
    assemble,
    await_commit,
    await_read_back,
    collect,
    publish,
    raise_if_failed,
    read_back,
    remove_stale,
    write_part,
)
from trainer.checkpoint.files import (
    StorageError,
    check_room,
    check_writable,
    remove_tree,
    storage_error,
)
from trainer.checkpoint.format import MANIFEST, FileEntry, step_name
from trainer.checkpoint.retention import hide, link_best, surplus
from trainer.checkpoint.staging import HostMemory, Staged, stage
from trainer.checkpoint.whole import Contents

__all__ = [
    "DurableCheckpointer",
    "SaveResult",
    "StorageError",
    "check_room",
    "check_writable",
    "remove_stale",
]

_ATTEMPT = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class SaveResult:
    """A committed save.

    Attributes:
        step: the step.
        path: its directory.
        bytes: of the whole checkpoint on rank 0, of the own shard on the others.
        seconds_stalled: that training waited in ``save``, for the save before and the copy.
        seconds_written: from then to the commit, in the background; reading it back takes longer.
    """

    step: int
    path: Path
    bytes: int
    seconds_stalled: float
    seconds_written: float


class DurableCheckpointer:
    """Saves the run's state under ``directory`` (``<run>/checkpoints``). One on every rank.

    Every rank calls ``save`` for the same steps in the same order; no collective is issued.

    Attributes:
        newest_step, newest_began: step and unix time of the newest save that was begun.

    Args:
        directory: the same path, on the same file system, for every rank.
        rank, world_size: of this process.
        attempt: names the launch generation; the same on every rank, and never used before in this
            directory: parts that a dead generation left must not pass for this one's. Letters, digits,
            ``-`` and ``_``.
        keep_last: newest checkpoints that stay (at least 1).
        keep_every: steps at multiples of it stay for good; 0: none do for that reason.
        timeout_seconds: how long rank 0 waits for the other ranks' shards after its own is written; they
            wait twice as long for rank 0.
        contents: of the model: a checkpoint without one of its tensors is refused. None: what is saved is no model,
            and only what some rank names can be missed.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world_size: int,
        attempt: str,
        keep_last: int,
        keep_every: int,
        timeout_seconds: float,
        contents: Contents | None = None,
    ) -> None:
        assert _ATTEMPT.fullmatch(attempt), f"attempt {attempt!r} must be letters, digits, - and _"
        assert keep_last >= 1
        self.directory = directory
        self.rank, self.world_size = rank, world_size
        self.attempt = attempt
        self.keep_last, self.keep_every = keep_last, keep_every
        self.timeout_seconds, self.contents = timeout_seconds, contents
        self._memory = HostMemory()
        self._num_saves = 0
        self.newest_step, self.newest_began = 0, time.time()
        self._writer: threading.Thread | None = None
        self._in_flight: int | None = None
        self._error: Exception | None = None
        self._finished: list[SaveResult] = []
        self._best_pending: int | None = None
        # Guards the four fields above and every change of which steps exist and which is best.
        self._lock = threading.Lock()

    def save(
        self,
        step: int,
        slices: Iterable[StateSlice],
        trainer_state: dict[str, Any],
        rank_tensors: dict[str, Tensor],
        info: dict[str, Any],
        since: float | None = None,
    ) -> None:
        """Begin to save a step; returns as soon as the state may change again.

        Args:
            step: optimizer steps done.
            slices: weights, buffers and optimizer slots of this rank; those with ``owner`` are written.
            trainer_state: JSON values; rank 0's are stored.
            rank_tensors: this rank's own tensors (RNG state), on any device.
            info: JSON values for people to read (layout, versions); rank 0's are stored.
            since: ``time.perf_counter()`` since when training has waited for this save; None: from now on.

        Raises:
            StorageError: the save before this one failed; this one was not begun.
        """
        began = time.perf_counter() if since is None else since
        self.wait()
        self.newest_began = time.time()
        self._num_saves += 1
        attempt = Attempt(self.directory, step, f"{self.attempt}-{self._num_saves}")
        # Through JSON text: later changes of the caller's dicts must not reach the manifest.
        texts = json.loads(json.dumps([trainer_state, info]))
        staged = stage(self.rank, slices, rank_tensors, self._memory)
        self._in_flight = self.newest_step = step
        self._writer = threading.Thread(
            target=self._write,
            args=(attempt, staged, texts[0], texts[1], time.perf_counter() - began),
            name=f"checkpoint-{step}",
            daemon=True,  # a crash elsewhere must not wait for it; the unfinished directory is hidden
        )
        self._writer.start()

    def wait(self) -> None:
        """Wait until no save is in flight.

        Raises:
            StorageError: it failed, on this rank or on one that it depends on; raised once.
        """
        self.join()
        error = self.take_error()
        if error is not None:
            raise error

    def join(self) -> None:
        """Wait until no save is in flight, whatever became of it."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    @property
    def error(self) -> Exception | None:
        """What went wrong with a save that has ended; None: nothing, or it was taken."""
        with self._lock:
            return self._error

    def take_error(self) -> Exception | None:
        """The same, and forget it: nobody is told of it again."""
        with self._lock:
            error, self._error = self._error, None
        return error

    def poll(self) -> list[SaveResult]:
        """Saves committed since the last call, oldest first."""
        with self._lock:
            finished, self._finished = self._finished, []
        return finished

    def committed(self, step: int) -> bool:
        """Whether the step has been committed (its checksums are verified on load)."""
        return (self.directory / step_name(step) / MANIFEST).is_file()

    def mark_best(self, step: int) -> None:
        """Make ``best`` a link to the step: now, or once it is committed if its save is in flight.

        The step that ``best`` names is never removed. Does nothing on ranks other than 0. A link that cannot be
        written is the save's failure (``error``, :meth:`wait`).

        Raises:
            ConfigError: the step is neither committed nor in flight.
        """
        if self.rank != 0:
            return
        with self._lock:
            if self._in_flight == step:
                self._best_pending = step
            elif self.committed(step):
                try:
                    self._link_best(step)
                except StorageError as error:
                    self._error = error
            elif self._error is None:  # else its save has failed, which the next call says
                raise ConfigError(
                    "checkpoint", step_name(step), "only a saved step can be the best", "save the step first"
                )

    def _link_best(self, step: int) -> None:
        try:
            link_best(self.directory, step, self.attempt)
        except OSError as error:
            raise storage_error(error, self.directory, 0) from error

    def _write(
        self, attempt: Attempt, staged: Staged, trainer: dict[str, Any], info: dict[str, Any], stalled: float
    ) -> None:
        """The writer thread: all of a save after the copy. Errors are kept for :meth:`wait`."""
        began = time.perf_counter()
        try:
            try:
                entry, size = self._commit(attempt, staged, trainer, info)
            except Exception as error:
                abandon(attempt, self.rank, self.world_size, error)
                raise
            seconds = time.perf_counter() - began
            self._read_back(attempt, entry)
            with self._lock:
                self._finished.append(SaveResult(attempt.step, attempt.final, size, stalled, seconds))
            if self.rank == 0:
                self._settle(attempt)
        except Exception as error:
            with self._lock:
                self._error = error
        finally:
            with self._lock:
                self._in_flight = self._best_pending = None

    def _commit(
        self, attempt: Attempt, staged: Staged, trainer: dict[str, Any], info: dict[str, Any]
    ) -> tuple[FileEntry, int]:
        """Until the step has its name; this rank's shard, and the bytes of all that it knows of."""
        try:
            entry = write_part(attempt, self.rank, staged)
            faults.reach("save", attempt.step, path=attempt.tmp)
            if self.rank != 0:
                await_commit(attempt, 2 * self.timeout_seconds)
                return entry, entry.bytes
            parts = collect(attempt, self.world_size, self.timeout_seconds)
            manifest = assemble(attempt, parts, trainer, info, self.contents)
            publish(attempt, manifest)
        except OSError as error:
            raise_if_failed(attempt)  # rank 0 removes the directory under a late writer's feet
            raise storage_error(error, attempt.directory, staged.image.size) from error
        return entry, sum(file.bytes for file in manifest.files.values())

    def _read_back(self, attempt: Attempt, entry: FileEntry) -> None:
        try:
            read_back(attempt, self.rank, self.world_size, entry)
            if self.rank == 0:
                await_read_back(attempt, self.world_size, self.timeout_seconds)
        except OSError as error:
            raise_if_failed(attempt)
            raise storage_error(error, attempt.directory, 0) from error

    def _settle(self, attempt: Attempt) -> None:
        """After a commit: the best link, then removal of what is no longer needed."""
        with self._lock:
            if self._best_pending == attempt.step:
                self._link_best(attempt.step)
            self._in_flight = self._best_pending = None
        try:
            with self._lock:
                going = surplus(self.directory, attempt.step, self.keep_last, self.keep_every)
                hidden = [hide(path) for path in going]
        except OSError as error:
            raise storage_error(error, self.directory, 0) from error
        for path in hidden:
            remove_tree(path)
