"""Which worker failed first, and of what.

One death brings others with it: survivors find their connections reset a few milliseconds later, or run
into a timeout of their collectives. Those are witnesses; naming one of them sends a person to the wrong
host. Here a signal or an exception of a worker's own is preferred to anything that reads like fallout,
then the earliest.
"""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launch.kernel import kernel_messages
from launch.liveness import behind, last_progress, stacks
from launch.outcome import EXIT_CONFIG, EXIT_DONE, EXIT_GAVE_UP, EXIT_STOPPED

if TYPE_CHECKING:
    from launch.workers import Worker

_FALLOUT = re.compile(
    r"connection (?:was )?(?:reset|closed|refused)|broken pipe|closed by peer|reset by peer|gloo|nccl"
    r"|remote process exited|socket timeout|timed? ?out|distnetworkerror|diststoreerror|distbackenderror",
    re.IGNORECASE,
)
_TIMEOUT = re.compile(r"timed? ?out", re.IGNORECASE)
_KERNEL_SECONDS = 5.0
"""How long before its last sign of life the kernel may have spoken of a process."""
_PLACES = re.compile(r"Where the ranks are: .*")


@dataclass(frozen=True)
class Failure:
    """A rank's failure.

    Attributes:
        kind: crash, hang, config, node-lost, …
        time: unix time, by the clock of its host.
        certain: False for what may only be the fallout of another one.
        evidence: the end of what it printed; its stacks, if it hung; what the kernel said.
        log: the file with all of it.
        began: unix time at which the fault most likely happened.
    """

    rank: int
    host: str
    kind: str
    cause: str
    exit_code: int
    time: float
    certain: bool
    evidence: str
    log: str
    began: float


def origin(failures: Iterable[Failure]) -> Failure | None:
    """The one to blame: an earliest that is certain, else an earliest witness."""
    return min(failures, key=lambda failure: (not failure.certain, failure.time), default=None)


def diagnose(workers: Sequence[Worker]) -> Failure | None:
    """The most likely origin of a group's failure so far; None while no worker has failed.

    Looks at error files of workers that still live, too: a worker writes it before its connections close.
    """
    found = origin(failure for worker in workers if (failure := _failure_of(worker)) is not None)
    if found is not None and not found.certain:
        stopped = next((worker for worker in workers if worker.code is None and worker.is_stopped()), None)
        culprit = stopped or (behind(workers) if found.kind == "hang" else None)
        if culprit is not None:
            places = _PLACES.search(found.cause)  # where a witness last saw everyone
            how = "suspended (SIGSTOP)" if culprit is stopped else f"stuck at {culprit.vitals()}"
            cause = f"{how} while the others waited for it"
            cause += f". {places[0]}" if places else ""
            culprit.evidence = culprit.evidence or stacks([culprit], culprit)
            return _failure(culprit, "hang", cause, 1, found.time, certain=True)
    return found


def _failure(
    worker: Worker,
    kind: str,
    cause: str,
    exit_code: int,
    time: float,
    certain: bool,
) -> Failure:
    host, log, progress = socket.gethostname(), str(worker.log), last_progress(worker)
    began = min(time, progress) if kind == "hang" and progress is not None else time
    evidence = worker.evidence or worker.log_tail()
    return Failure(worker.rank, host, kind, cause, exit_code, time, certain, evidence, log, began)


def _failure_of(worker: Worker) -> Failure | None:
    code, report = worker.code, worker.report()
    if worker.hang is not None:
        return _failure(worker, "hang", worker.hang.cause, 1, worker.hang.began, worker.hang.certain)
    if code in (EXIT_DONE, EXIT_STOPPED):
        return None
    if report is not None:
        cause = str(report.get("cause", "unknown"))
        exit_code = report.get("exit_code", 1)
        kind = str(report.get("kind", "crash"))
        found = _failure(
            worker,
            "hang" if kind == "crash" and _TIMEOUT.search(cause) else kind,
            cause,
            exit_code if isinstance(exit_code, int) else 1,
            float(report["time"]),
            certain=exit_code in (EXIT_CONFIG, EXIT_GAVE_UP) or not _FALLOUT.search(cause),
        )
        # All ranks may have agreed that another one is to blame.
        names = ("rank", "host", "began", "evidence")
        return replace(found, **{name: report[name] for name in names if name in report})
    if code is None:
        return None
    if code < 0:
        # It died between the last look and this one, before anyone could have suffered from it.
        cause, certain = f"killed by {signal_name(-code)}", code != -signal.SIGABRT
        if said := kernel_messages(since=worker.seen_alive - _KERNEL_SECONDS):
            worker.evidence = f"{said}\n{worker.log_tail()}".strip()
        if worker.is_orphaned():
            cause = "ended with the standby process that it was forked from"
        cause = worker.bereft or cause
        return _failure(worker, "crash", cause, code, worker.seen_alive, certain)
    lines = worker.log_tail().splitlines()
    cause = f"exit code {code}" + (f": {lines[-1].strip()}" if lines else "")
    return _failure(worker, "crash", cause, code, worker.seen_alive, not _FALLOUT.search(cause))


def signal_name(number: int) -> str:
    """``SIGKILL`` for 9; the number for what has no name here."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def has_failed(codes: Iterable[int | None]) -> bool:
    """Whether any of these exit codes (None: alive) is another than done or saved."""
    return any(code not in (None, EXIT_DONE, EXIT_STOPPED) for code in codes)
