"""Supervises this node's workers: starts them, names what failed, starts them again, stops them in order.

::

    generation g:  start all ──▶ watch ──▶ all exit 0 ─────────────▶ done (0)
                                   │ ──▶ one exits 2 ──────────────▶ stop all; the user's error (2)
                                   │ ──▶ stop asked for, exit 75 ──▶ saved, resumable (75)
                                   └ ──▶ anything else ──▶ SIGKILL the rest, event `failure`
                                                             │ budget left: generation g + 1
                                                             └ spent: gave up (70)

The store that workers meet at lives in this process and outlives generations; each generation uses a key
prefix of its own, so that nothing of a dead one can be mistaken for the next.
"""

from __future__ import annotations

import enum
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any, Protocol

from launch.failure import Failure, has_failed
from launch.outcome import EXIT_CONFIG, EXIT_DONE, EXIT_GAVE_UP, EXIT_STOPPED, Outcome
from trainer.checkpoint.files import StorageError
from trainer.metrics.patient import PatientWriter
from trainer.metrics.schema import EVENTS_FILE, check_event
from trainer.rundir import RunDirectory

_POLL_SECONDS = 0.05


class RestartBudget:
    """Restarts that are left: refilled by every newer step that is committed in any tier."""

    def __init__(self, max_restarts: int, newest_checkpoint: int | None) -> None:
        self.max_restarts, self.used = max_restarts, 0
        self._newest = newest_checkpoint

    def spend(self, newest_checkpoint: int | None) -> bool:
        """Count a failure; whether the group may start again."""
        if newest_checkpoint is not None and (self._newest is None or newest_checkpoint > self._newest):
            self.used, self._newest = 0, newest_checkpoint
        self.used += 1
        return self.used <= self.max_restarts


def _newest(*steps: int | None) -> int | None:
    return max((step for step in steps if step is not None), default=None)


class StopRequest:
    """Ctrl-C, SIGTERM and a closed terminal, as flags that the watch loop reads.

    The handler takes no lock: it may have interrupted whoever holds it.
    """

    def __init__(self) -> None:
        self.cause: str | None = None
        self.now = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C is impatience; schedulers repeat SIGTERM and mean it only once.
        self.now = self.now or (self.cause is not None and number == signal.SIGINT)
        self.cause = self.cause or signal.Signals(number).name

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals; what they did before is put back at the end."""
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]  # USR1: Slurm, ahead of a time limit
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Group(Protocol):
    """The workers of one generation, wherever they are.

    Attributes:
        settle_seconds: how long to look for the origin of a failure once only its fallout has been seen.
    """

    settle_seconds: float

    def codes(self) -> list[int | None]:
        """Look: the exit code of each rank, None while it lives."""
        ...

    def failure(self) -> Failure | None:
        """The most likely origin of what has failed so far."""
        ...

    def committed(self) -> int | None:
        """The newest step whose state is complete in any tier, as far as the workers have told."""
        ...

    def asked_to_stop(self) -> str | None:
        """The signal that somebody other than this process was given to stop the run."""
        ...

    def regroup(self) -> str | None:
        """Why the workers are to save and start again in another layout: nodes have come. None: they are not."""
        ...

    def terminate(self) -> None:
        """Ask every worker to save and go."""
        ...

    def kill(self) -> None:
        """End every worker; none is left when this returns."""
        ...


class Incomplete(Exception):
    """A generation cannot start, because a node is missing. ``stopped``: the wait was ended by a signal."""

    def __init__(self, cause: str, stopped: bool = False) -> None:
        super().__init__(cause)
        self.stopped = stopped


class _End(enum.Enum):
    done = "done"
    stopped = "stopped"
    regrouped = "regrouped"
    failed = "failed"


class Agent:
    """Runs generations of workers until the run is done, stopped or given up.

    Args:
        run: where logs and events go.
        start: the workers of a generation, started, given its number and whether they check their exchanges
            (after a hang); raises Incomplete. Leaving their context kills them.
        max_restarts: consecutive failures without a newer checkpoint that are answered by a restart.
        stop_grace_seconds: how long workers may take to save after Ctrl-C or SIGTERM.
        say: shows the user a line.
        blame: told of every failure.
    """

    def __init__(
        self,
        run: RunDirectory,
        start: Callable[[int, bool], AbstractContextManager[Group]],
        max_restarts: int,
        stop_grace_seconds: float,
        say: Callable[[str], None] = print,
        blame: Callable[[Failure], None] = lambda failure: None,
    ) -> None:
        self._blame = blame
        self.run_directory, self._start = run, start
        self.budget = RestartBudget(max_restarts, run.newest_checkpoint())
        self.stop_grace_seconds = stop_grace_seconds
        self.stop = StopRequest()
        self._say = say
        # A full disk must neither silence the supervisor nor take it down.
        self._events = PatientWriter(
            run.path / EVENTS_FILE,
            check_event,
            lambda path, reason: say(f"{path.name} cannot be written: {reason}; its lines wait in memory"),
            lambda path, number: say(f"{path.name} is written again; {number} line(s) had waited"),
        )

    def run(self) -> Outcome:
        """Supervise to the end. Call it from the main thread; no worker survives it."""
        generation = self.run_directory.next_generation()
        failure: Failure | None = None
        with self.stop.listening(), self._last_words():
            while True:
                try:
                    with self._start(generation, failure is not None and failure.kind == "hang") as group:
                        end = self._watch(group)
                        stopped_by = self.stop.cause or group.asked_to_stop()
                        failure = self._settled(group) if end is _End.failed else None
                        if end is _End.failed and EXIT_STOPPED in group.codes():
                            # The others saved and left; this one fell over their absence.
                            end = _End.stopped if failure is None or not failure.certain else end
                except Incomplete as missing:
                    if missing.stopped:
                        return self._stopped(saved=False)
                    return self._gave_up(str(missing), failure)
                # The group is dead here.
                if end is _End.done:
                    return Outcome(EXIT_DONE)
                if end is _End.regrouped:
                    generation += 1
                    continue
                if end is _End.stopped:
                    saved = all(code in (EXIT_DONE, EXIT_STOPPED) for code in group.codes())
                    return self._stopped(saved)
                assert failure is not None
                if failure.exit_code == EXIT_CONFIG:
                    if failure.kind != "config":
                        # The input was right. Saves that failed were told when they did.
                        who = {name: getattr(failure, name) for name in ("kind", "rank", "host")}
                        reason = f"{failure.kind} failed"
                        self._event("stop", reason=reason, resumable=True, **who, cause=failure.evidence)
                    return Outcome(EXIT_CONFIG, failure.cause)
                self._record_failure(failure, generation)
                self._blame(failure)
                if stopped_by is not None or self.stop.cause is not None:
                    return self._stopped(saved=False)
                if failure.exit_code == EXIT_GAVE_UP:
                    return self._gave_up(f"over {failure.kind}: no restart would mend it", failure)
                if not self.budget.spend(_newest(self.run_directory.newest_checkpoint(), group.committed())):
                    return self._gave_up(
                        f"after {self.budget.used - 1} restart(s) without a new checkpoint "
                        f"(resilience.max_restarts={self.budget.max_restarts})",
                        failure,
                    )
                generation += 1

    def _watch(self, group: Group) -> _End:
        """Until the group has ended in one way or another; returns at the first failure."""
        deadline: float | None = None
        regroup: str | None = None
        while True:
            codes = group.codes()
            cause = self.stop.cause or group.asked_to_stop()
            left = _End.stopped if regroup is None or cause is not None else _End.regrouped
            if has_failed(codes):
                return _End.failed
            if None not in codes:
                return _End.done if set(codes) == {EXIT_DONE} else left
            if deadline is None and cause is None and (regroup := group.regroup()) is not None:
                self._say(f"{regroup}: saving, then starting again.")
                self._event("regroup", reason=regroup)
                group.terminate()
                deadline = time.monotonic() + self.stop_grace_seconds
            if deadline is None and (cause is not None or EXIT_STOPPED in codes):
                self._say(f"{cause or 'A worker'}: saving, then stopping. Ctrl-C again stops at once.")
                group.terminate()
                deadline = time.monotonic() + self.stop_grace_seconds
            if self.stop.now:
                self._say("Stopping at once.")
                return _End.stopped
            if deadline is not None and time.monotonic() > deadline:
                self._say(f"Not saved within resilience.stop_grace_seconds={self.stop_grace_seconds:g}.")
                return left
            time.sleep(_POLL_SECONDS)

    def _settled(self, group: Group) -> Failure | None:
        """The origin of a failure; a witness alone is given a moment for the culprit to show."""
        until = time.monotonic() + group.settle_seconds
        while True:
            failure = group.failure()
            if (failure is not None and failure.certain) or time.monotonic() > until:
                return failure
            time.sleep(_POLL_SECONDS)
            group.codes()

    def _record_failure(self, failure: Failure, generation: int) -> None:
        self._event(
            "failure",
            kind=failure.kind,
            rank=failure.rank,
            host=failure.host,
            cause=failure.cause,
            generation=generation,
            exit_code=failure.exit_code,
            evidence=failure.evidence,
            log=failure.log,
            began=failure.began,
        )
        log = f" Its log: {failure.log}" if failure.log else ""
        self._say(f"rank {failure.rank} on {failure.host} failed ({failure.kind}): {failure.cause}.{log}")

    @contextmanager
    def _last_words(self) -> Iterator[None]:
        """At the end try again to write what a full disk refused."""
        try:
            yield
        finally:
            self._events.flush()

    def _event(self, event: str, **fields: Any) -> None:
        step = self.run_directory.last_logged_step()
        with suppress(StorageError):  # more waits than is kept: the user was told
            self._events.write({"time": time.time(), "step": step, "event": event, **fields})

    def _stopped(self, saved: bool) -> Outcome:
        newest = self.run_directory.newest_checkpoint()
        at = "from the start: nothing was saved yet" if newest is None else f"from step {newest}"
        how = "Stopped and saved" if saved else "Stopped without saving"
        return Outcome(EXIT_STOPPED, f"{how}. Go on {at}:\n  muster resume {self.run_directory.path}")

    def _gave_up(self, why: str, failure: Failure | None) -> Outcome:
        lines = [f"Gave up {why}."]
        if failure is not None:
            lines.append(f"Last failure: rank {failure.rank} on {failure.host}, {failure.cause}")
            if failure.log:
                lines.append(f"  log: {failure.log}")
        lines.append(f"  when it is mended: muster resume {self.run_directory.path}")
        self._event(
            "stop", reason=f"gave up {why}" + (f": {failure.cause}" if failure else ""), resumable=True
        )
        return Outcome(EXIT_GAVE_UP, "\n".join(lines))
