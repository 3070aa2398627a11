"""Saves that fail: training goes on with the checkpoints it has, and every rank decides the same.

A rank learns at a moment of its own that a save has failed. So it is only counted where the next save begins,
in the gathering that this needs anyway: there every rank hears of every other's, and all go on or all stop.
Rank 0 writes the event as soon as it knows.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.checkpoint.durable import DurableCheckpointer
from trainer.checkpoint.files import StorageError
from trainer.runlog import RunLog


@dataclass(frozen=True)
class FailedSave:
    """A save that failed, as the rank that it failed for tells it.

    Attributes:
        step: of the save.
        rank, host: where the fault was.
        path: that could not be written.
        cause, fix: of the error.
        began: unix time at which the save began.
    """

    step: int
    rank: int
    host: str
    path: str
    cause: str
    fix: str
    began: float


class FailedSaves:
    """Reports failed saves and stops a run in which too many fail in a row.

    Args:
        checkpoints: of this rank.
        max_failed: failed saves in a row that end the run; the same on every rank.
        log: takes the events on rank 0.
    """

    def __init__(self, checkpoints: DurableCheckpointer, max_failed: int, log: RunLog) -> None:
        self.checkpoints, self.max_failed, self._log = checkpoints, max_failed, log
        self.in_a_row = 0
        self._reported = False

    def own(self) -> FailedSave | None:
        """Wait for the save in flight; what this rank has to tell of it.

        Raises:
            Exception: of its writer, if the storage is not to blame.
        """
        self.checkpoints.join()
        failed = self._failed()
        self.checkpoints.take_error()
        return failed

    def agree(self, told: Sequence[FailedSave | None]) -> None:
        """Count the save before this one, given what every rank had to tell of it; the same on all of them.

        Raises:
            StorageError: it was the last one that may fail.
        """
        failed = next((save for save in told if save is not None), None)
        self.in_a_row = 0 if failed is None else self.in_a_row + 1
        if failed is None:
            return
        self._write(failed)
        self._reported = False
        if self.in_a_row >= self.max_failed:
            limit = f"checkpoint.max_failed_saves={self.max_failed}"
            number = "a save" if self.in_a_row == 1 else f"{self.in_a_row} saves in a row"
            error = StorageError(
                "checkpoint", failed.path, f"{failed.cause}; {number} failed ({limit})", failed.fix
            )
            error.rank, error.host = failed.rank, failed.host
            raise error

    def report(self) -> None:
        """Write the event of a save that is known to have failed; raises as :meth:`own` does."""
        failed = self._failed()
        if failed is not None:
            self._write(failed)

    def _failed(self) -> FailedSave | None:
        error = self.checkpoints.error
        if error is None:
            return None
        if not isinstance(error, StorageError):
            raise error
        return FailedSave(
            step=self.checkpoints.newest_step,
            rank=self.checkpoints.rank if error.rank is None else error.rank,
            host=socket.gethostname() if error.host is None else error.host,
            path=str(error.value),
            cause=error.relation,
            fix=error.fix,
            began=self.checkpoints.newest_began,
        )

    def _write(self, failed: FailedSave) -> None:
        """Once a save, the first that is heard of it."""
        if self._reported:
            return
        self._reported = True
        self._log.event(
            "failure",
            failed.step,
            kind="storage",
            rank=failed.rank,
            host=failed.host,
            cause=failed.cause,
            path=failed.path,
            evidence=f"the checkpoint of step {failed.step} was not written. {failed.fix}",
            began=failed.began,
        )
