"""Where the seconds of a run went, from its events and metrics alone.

Every second from the first ``start`` to the last sign of life is given to exactly one cause (docs/metrics.md lists
them). The recoveries come first (:mod:`trainer.metrics.recovery`); between them steps are useful, waits are what
their events say, and what nothing explains is *other*, never silently useful.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from trainer.metrics.recovery import Span, follow
from trainer.metrics.schema import Record, number

CAUSES = (
    *(
        "useful",
        "startup",
        "checkpoint",
        "evaluation",
        "detect",
        "restart",
        "load",
        "recompute",
        "straggling",
    ),
    "other",
)


@dataclass
class Account:
    """Seconds by cause. ``stopped`` (no machine held) is outside of ``wall``."""

    useful: float = 0.0
    startup: float = 0.0
    checkpoint: float = 0.0
    evaluation: float = 0.0
    detect: float = 0.0
    restart: float = 0.0
    load: float = 0.0
    recompute: float = 0.0
    straggling: float = 0.0
    other: float = 0.0
    stopped: float = 0.0

    @property
    def wall(self) -> float:
        """Seconds since the first start in which the run held its machines: the sum of all causes."""
        return sum(getattr(self, cause) for cause in CAUSES)

    @property
    def goodput(self) -> float:
        """Useful share of ``wall``, 0 to 1."""
        return self.useful / self.wall if self.wall > 0 else 0.0

    def add(self, part: Account) -> None:
        """Add another account's seconds to this one."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(part, item.name))


def account(events: Sequence[Record], records: Sequence[Record]) -> Account:
    """Give every second from the first ``start`` to the last sign of life to one cause.

    Args:
        events: events.jsonl in order of time.
        records: metrics.jsonl, each step once.
    """
    return _Ledger(events, records).total


class _Purse:
    """The seconds of a span. A cause takes at most what is left, so that the parts sum to the whole."""

    def __init__(self, seconds: float) -> None:
        self.left, self.account = max(0.0, seconds), Account()

    def take(self, cause: str, seconds: float) -> None:
        seconds = min(max(seconds, 0.0), self.left)
        self.left -= seconds
        setattr(self.account, cause, getattr(self.account, cause) + seconds)


class _Ledger:
    """Cuts a run's time into spans and accounts for each.

    Attributes:
        total: the account.
        done: the highest step whose seconds were counted as useful so far.
    """

    def __init__(self, events: Sequence[Record], records: Sequence[Record]) -> None:
        self.total, self.done = Account(), 0
        self._events, self._records = events, records
        starts = [event for event in events if event["event"] == "start"]
        if not starts:
            return
        seconds = [number(record.get("perf/step_seconds")) for record in records]
        self._mean_step = sum(seconds) / len(seconds) if seconds else 0.0
        self._median_step = statistics.median(seconds) if seconds else 0.0
        self._lead = "startup"
        """What the time before the first step of the next span is called; empty: it follows other steps."""
        self.done = int(starts[0]["step"])
        self._walk(starts[0]["time"], max(entry["time"] for entry in (*events, *records)))

    def _walk(self, at: float, last: float) -> None:
        clock = follow(self._events, self._records, self._mean_step)
        recoveries = clock.spans_until(last)
        spans = [*recoveries, *self._stopped(recoveries)]
        for span in sorted(spans, key=lambda span: (span.since, span.until)):
            since, until = max(span.since, at), max(at, min(span.until, last))
            self._running(at, since, clock.targets.get(span.since))
            if span.cause == "straggling":
                self._running(since, until, clock.targets.get(until), straggling=True)
            else:
                setattr(self.total, span.cause, getattr(self.total, span.cause) + until - since)
                if span.cause in ("stopped", "restart"):
                    self._lead = "startup" if span.cause == "stopped" else "restart"
                elif span.cause == "recompute":
                    self._lead = ""
            at = until
        self._running(at, last, None)

    def _stopped(self, recoveries: Sequence[Span]) -> list[Span]:
        """From each stop or finish to the next start, or to the load before that. Where the nodes only regroup,
        they are held meanwhile, and it is a restart."""
        spans, since, cause = [], None, "stopped"
        for event in self._events:
            if event["event"] == "regroup":
                cause = "restart"
            if event["event"] in ("stop", "finish"):
                since = event["time"]
            elif event["event"] == "start" and since is not None:
                until = event["time"]
                loads = [s.since for s in recoveries if s.cause == "load" and since <= s.since < until]
                spans.append(Span(cause, since, min([until, *loads])))
                since, cause = None, "stopped"
        return spans

    def _waits(self, name: str, field: str, since: float, until: float) -> float:
        """Sum of a field of the events of one kind with since < time ≤ until."""
        return sum(
            number(e.get(field)) for e in self._events if e["event"] == name and since < e["time"] <= until
        )

    def _all_waits(self, since: float, until: float) -> float:
        return self._waits("checkpoint", "stall_seconds", since, until) + self._waits(
            "evaluation", "seconds", since, until
        )

    def _running(self, since: float, until: float, target: int | None, straggling: bool = False) -> None:
        """Account for a span in which steps were made.

        Args:
            target: step reached at its end, if it ends with a fault.
            straggling: what a step took beyond the median is lost.
        """
        if until <= since:
            self.done = max(self.done, target or 0)
            return
        purse = _Purse(until - since)
        purse.take("checkpoint", self._waits("checkpoint", "stall_seconds", since, until))
        purse.take("evaluation", self._waits("evaluation", "seconds", since, until))
        records = [record for record in self._records if since < record["time"] <= until]
        first_steps = max(0, records[0]["step"] - self.done) if records else 0
        for record in records:
            seconds = number(record.get("perf/step_seconds"))
            seconds = min(seconds, self._median_step) if straggling else seconds
            purse.take("useful", seconds * max(0, record["step"] - self.done))
            self.done = max(self.done, record["step"])
        if target is not None and (records or not self._lead):
            # Steps whose records the restart has dropped, and the one that the fault cut off.
            logged = records[-1]["time"] if records else since
            lost = self._mean_step * max(0, target - self.done)
            purse.take("useful", lost)
            purse.take("recompute", until - logged - self._all_waits(logged, until) - lost)
            self.done = max(self.done, target)
        if self._lead:
            lead = purse.left
            if records:
                first = records[0]
                lead = first["time"] - since - number(first.get("perf/step_seconds")) * first_steps
                lead -= self._all_waits(since, first["time"])
            purse.take(self._lead, lead)
            self._lead = ""
        purse.take("straggling" if straggling else "other", purse.left)
        self.total.add(purse.account)


class GoodputMeter:
    """The ``ft/…`` metrics while a run goes on, at constant cost a step.

    Args:
        events, records: the run's files as they are after ``truncate_after``, with the ``start`` and
            ``resume`` of this generation in them.
    """

    def __init__(self, events: Sequence[Record], records: Sequence[Record]) -> None:
        ledger = _Ledger(events, records)
        self._useful, self._stopped, self._done = ledger.total.useful, ledger.total.stopped, ledger.done
        self._first_start = next((event["time"] for event in events if event["event"] == "start"), None)
        self._step = 0
        self._lost_steps, self._restart_seconds, self._stall_seconds = 0, 0.0, 0.0
        for event in events:
            self.event(event)

    def event(self, event: Record) -> None:
        """Count an event."""
        name = event["event"]
        if name == "restart":
            self._lost_steps += int(event["lost_steps"])
            self._restart_seconds += number(event["restart_seconds"])
        elif name == "checkpoint":
            self._stall_seconds += number(event["stall_seconds"])
        elif name in ("start", "resume", "rollback"):
            self._step = int(event["step"])

    def steps(self, step: int, seconds: float) -> None:
        """Count the wall seconds of the steps since the last call; those done before a fault count once."""
        number_of_steps, new = step - self._step, step - max(self._step, self._done)
        if number_of_steps > 0 and new > 0:
            self._useful += seconds * new / number_of_steps
        self._step, self._done = step, max(self._done, step)

    def metrics(self, now: float) -> dict[str, float]:
        """The four ``ft/…`` metrics at a unix time."""
        wall = now - self._first_start - self._stopped if self._first_start is not None else 0.0
        return {
            "ft/goodput": min(1.0, self._useful / wall) if wall > 0 else 0.0,
            "ft/lost_steps": self._lost_steps,
            "ft/restart_seconds": self._restart_seconds,
            "ft/checkpoint_stall_seconds": self._stall_seconds,
        }
