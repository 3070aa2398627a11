"""Where the time of each recovery went: from a fault to the step that was reached before it.

    fault ── detect ──▶ noticed ── restart ──▶ loading ── load ──▶ loaded ── recompute ──▶ reached again

A fault that comes before that end belongs to the same recovery: the parts add up, and go on adding up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.metrics.schema import Record, interrupts, number

PARTS = ("detect", "restart", "load", "recompute")


@dataclass(frozen=True)
class Span:
    """Unix seconds that went to one cause; ``straggling`` is a time of slow steps, not one without steps."""

    cause: str
    since: float
    until: float


@dataclass
class _Recovery:
    """The one under way.

    Attributes:
        kind: of its first failure.
        began: unix time of the fault.
        target: step reached before it.
        mark: end of the parts so far.
        halted: when the last step before it may have been made: ``began``; of a straggler, when it was noticed.
        resumed: step of the state that was loaded; None before. ``before``: what it was before the newest fault.
        started: when the new generation said that it began.
        parts: seconds by name.
        spans: not certain yet: training may turn out to go on without a restart.
    """

    kind: str
    began: float
    target: int
    mark: float
    halted: float
    resumed: int | None = None
    before: int | None = None
    started: float | None = None
    num_failures: int = 0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    spans: list[Span] = field(default_factory=list)

    def go(self, part: str, until: float, cause: str = "") -> None:
        """The time since ``mark`` went to a part."""
        until = max(until, self.mark)
        self.parts[part] += until - self.mark
        self.spans.append(Span(cause or part, self.mark, until))
        self.mark = until


class RecoveryClock:
    """Follows events and steps in order of their times.

    Attributes:
        spans: of all recoveries so far, without overlap, oldest first.
        targets: step reached before each recovery in ``spans``, by the time after which no step was made.

    Args:
        step_seconds: of a typical step: what a failure without ``began`` is dated with.
    """

    def __init__(self, step_seconds: float = 0.0) -> None:
        self.spans: list[Span] = []
        self.targets: dict[float, int] = {}
        self._step_seconds = step_seconds
        self._open: _Recovery | None = None
        self._running = False
        self._generation = 0
        self._step, self._alive, self._floor = 0, -math.inf, -math.inf

    def event(self, event: Record) -> None:
        """Take in an event."""
        name, now = event["event"], event["time"]
        if name == "start":
            if self._running and self._open is None:  # it died and nobody said so
                self._begin("unknown", self._alive, self._step)
            self._running, self._generation = True, int(event["generation"])
            self._step, self._alive = 0, now
            if self._open is not None:
                self._open.started = now
        elif interrupts(event):
            self._failure(event)
        elif name == "alarm" and event["kind"] == "straggler":
            if self._open is None:
                self.spans.append(Span("straggling", max(event["began"], self._floor), now))
                self._floor = now
        elif name == "restart" and self._open is not None:
            self._open.target = max(self._open.target, int(event["step"]) + int(event["lost_steps"]))
        elif name == "rollback":
            if self._open is None:
                self._begin("rollback", now, int(event.get("from_step", self._step)))
            assert self._open is not None
            if self._open.num_failures <= 1:  # in the process itself it is known exactly
                self._open.target = int(event.get("from_step", self._open.target))
            self._loaded(int(event["step"]), now, number(event.get("load_seconds")))
        elif name == "resume":
            self._loaded(int(event["step"]), now, number(event.get("load_seconds")))
        elif name == "recovered" and self._open is not None:
            self._from_the_beginning()
            self._close(now)
        elif name in ("stop", "finish"):
            self._end(now)
            self._running, self._floor = False, now

    def step(self, step: int, now: float) -> dict[str, Any] | None:
        """A step was completed. Returns the fields of the event ``recovered`` if that ends a recovery."""
        found = None
        if self._open is not None:
            self._from_the_beginning()
            if self._open.resumed is None:
                self._went_on()
            if self._open is not None and step >= self._open.target:
                found = self._close(now)
        self._step, self._alive = step, max(self._alive, now)
        return found

    def spans_until(self, now: float) -> list[Span]:
        """The spans, with those of a recovery that is still under way."""
        if self._open is None:
            return self.spans
        self.targets[self._open.halted] = self._open.target
        part = "restart" if self._open.resumed is None else "recompute"
        return [*self.spans, *self._open.spans, Span(part, self._open.mark, max(now, self._open.mark))]

    def _begin(self, kind: str, began: float, target: int) -> None:
        began = max(began, self._floor)
        self._open = _Recovery(kind, began, target, began, began)

    def _failure(self, event: Record) -> None:
        now, step = event["time"], int(event["step"])
        guess = self._alive + self._step_seconds * max(0, step - self._step)
        began = min(event.get("began") or guess, now)
        if self._open is None:
            self._begin(str(event["kind"]), began, step)
        else:
            self._open.go("restart" if self._open.resumed is None else "recompute", began)
            self._open.target = max(self._open.target, step)
        assert self._open is not None
        self._open.num_failures += 1
        self._open.before, self._open.resumed, self._open.started = self._open.resumed, None, None
        slow = event["kind"] == "straggler"
        if slow and self._open.mark == self._open.began:
            self._open.halted = now
        self._open.go("detect", now, "straggling" if slow else "")

    def _from_the_beginning(self) -> None:
        """A new generation trains without having loaded anything: nothing had been saved."""
        if self._open is not None and self._open.resumed is None and self._open.started is not None:
            self._loaded(0, self._open.started, 0.0)

    def _went_on(self) -> None:
        """Training goes on without a restart after a failure: it was no interruption."""
        assert self._open is not None
        self.spans += [span for span in self._open.spans if span.cause == "straggling"]
        self._open.spans = []
        if self._open.before is None:
            self._open = None
        else:  # that recovery is still under way
            self._open.resumed = self._open.before

    def _loaded(self, step: int, now: float, load_seconds: float) -> None:
        self._step, self._alive = step, now
        recovery = self._open
        if recovery is None:
            if load_seconds and self._floor > -math.inf:  # after a stop
                self.spans.append(Span("load", max(self._floor, now - load_seconds), now))
            return
        recovery.go("restart", now - load_seconds)
        recovery.go("load", now)
        recovery.resumed = step
        self.spans += recovery.spans  # certain now
        recovery.spans = []
        self.targets[recovery.halted] = recovery.target
        self._floor = recovery.mark

    def _close(self, now: float) -> dict[str, Any]:
        """The step reached before the fault is done again: the fields of ``recovered``."""
        recovery = self._open
        assert recovery is not None
        again = recovery.target > (recovery.resumed or 0)
        recovery.go("recompute", now)
        if again:  # else this step was not computed before: it is useful
            self.spans += recovery.spans
            self._floor = recovery.mark
        self._open = None
        return {
            "kind": recovery.kind,
            "generation": self._generation,
            "failures": recovery.num_failures,
            **{f"{part}_seconds": seconds for part, seconds in recovery.parts.items()},
            "seconds": now - recovery.began,
        }

    def _end(self, now: float) -> None:
        """The run stops before it has recovered."""
        if self._open is not None:
            self.spans = self.spans_until(now)
            self._open = None


def follow(events: Sequence[Record], records: Sequence[Record], step_seconds: float) -> RecoveryClock:
    """The clock after a run's events and logged steps."""
    clock = RecoveryClock(step_seconds)
    for entry in merged(events, records):
        if "event" in entry:
            clock.event(entry)
        else:
            clock.step(int(entry["step"]), entry["time"])
    return clock


def merged(events: Sequence[Record], records: Sequence[Record]) -> Iterable[Record]:
    """Both in order of time; of the same time, steps first."""
    return sorted([*records, *events], key=lambda entry: entry["time"])
