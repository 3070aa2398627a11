"""Which worker failed first, and of what.

One death brings others with it: survivors find their connections reset a few milliseconds later, or run
into a timeout of their collectives. Those are witnesses; naming one of them sends a person to the wrong
host. Here a signal or an exception of a worker's own is preferred to anything that reads like fallout,
then the earliest.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass

from launch.outcome import EXIT_CONFIG, EXIT_DONE, EXIT_STOPPED
from launch.workers import Worker, WorkerGroup

_FALLOUT = re.compile(
    r"connection (?:was )?(?:reset|closed|refused)|broken pipe|closed by peer|reset by peer|gloo|nccl"
    r"|remote process exited|socket timeout|timed? ?out|distnetworkerror|diststoreerror|distbackenderror",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """A worker's failure. ``certain`` is False for what may only be the fallout of another one."""

    worker: Worker
    kind: str
    cause: str
    exit_code: int
    time: float
    certain: bool

    @property
    def rank(self) -> int:
        """The rank to blame."""
        return self.worker.rank


def diagnose(group: WorkerGroup) -> Failure | None:
    """The most likely origin of a group's failure so far; None while no worker has failed.

    Looks at error files of workers that still live, too: a worker writes it before its connections close.
    """
    found = [failure for worker in group.workers if (failure := _failure_of(worker)) is not None]
    if not found:
        return None
    origin = min(found, key=lambda failure: (not failure.certain, failure.time))
    if not origin.certain:
        stopped = next((worker for worker in group.alive if worker.is_stopped()), None)
        if stopped is not None:
            cause = "suspended (SIGSTOP) while the others waited for it"
            return Failure(stopped, "hang", cause, 1, origin.time, certain=True)
    return origin


def _failure_of(worker: Worker) -> Failure | None:
    code, report = worker.code, worker.report()
    if code in (EXIT_DONE, EXIT_STOPPED):
        return None
    if report is not None:
        cause = str(report.get("cause", "unknown"))
        exit_code = report.get("exit_code", 1)
        return Failure(
            worker,
            str(report.get("kind", "crash")),
            cause,
            exit_code if isinstance(exit_code, int) else 1,
            float(report["time"]),
            certain=exit_code == EXIT_CONFIG or not _FALLOUT.search(cause),
        )
    if code is None:
        return None
    if code < 0:
        # It died between the last look and this one, before anyone could have suffered from it.
        return Failure(
            worker,
            "crash",
            f"killed by {signal_name(-code)}",
            code,
            worker.seen_alive,
            code != -signal.SIGABRT,
        )
    lines = worker.log_tail().splitlines()
    cause = f"exit code {code}" + (f": {lines[-1].strip()}" if lines else "")
    return Failure(worker, "crash", cause, code, worker.seen_alive, not _FALLOUT.search(cause))


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; the number for what has no name here."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def has_failed(workers: Iterable[Worker]) -> bool:
    """Whether any of these has exited otherwise than done or saved."""
    return any(worker.code not in (None, EXIT_DONE, EXIT_STOPPED) for worker in workers)
