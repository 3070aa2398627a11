"""A rank that works slowly makes every rank slow: the others wait for it in the next collective. It is named here.

Step times say nothing of who is to blame, since all ranks' steps take as long as the slowest one's. What a rank
*works* in a step does: the step's time less what it waited in collectives (:class:`WaitClock`), where the slow one
hardly waits and the others do. Every rank takes the median over a window of steps; rank 0 compares them.

The numbers travel through the rendezvous store, by the thread that beats (:mod:`trainer.liveness`): one small key a
rank and window, read by rank 0 at most once a second. No collective and no wait is added to a step, it is the same
with and without an agent, and it works over nodes. What the thread finds, the training's thread of rank 0 tells.

Where a rank's waits are not all seen (DistributedDataParallel waits in native code) its work looks longer than it
is, of all ranks alike: a straggler may be missed then, but nobody is named wrongly. A rank whose experts get more
tokens than others' has more to do: it is compared as if all of its work had grown with them.
"""

from __future__ import annotations

import json
import math
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from parallel.errors import NamedFailure
from trainer.config import Device, RunConfig
from trainer.config_survival import StragglerAction
from trainer.health.ranks import rank_shares
from trainer.liveness import Vitals
from trainer.metrics.jsonl import read_events
from trainer.metrics.schema import EVENTS_FILE

_WINDOWS = 3
"""Windows in a row that a rank must be slow, or no longer slow, for it to be told."""
_LEAST_STEPS = 5
_LOOK_SECONDS = 1.0
_STORE_SECONDS = 5.0
_MAX_LISTED = 16
_MAX_REPLACED = 3
"""Times in a run that a host's ranks are replaced; one that is still slow then is only named."""


class WaitClock:
    """Sums up the seconds that one thread of this process waits in collectives.

    Torch's own functions end in ``Work.wait`` wherever the host waits: it is timed. Only one clock runs at a time.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._thread = threading.get_ident()

    @contextmanager
    def running(self) -> Iterator[WaitClock]:
        """Count what the calling thread waits from here to the end of the context."""
        self._thread, original = threading.get_ident(), dist.Work.wait

        def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(work, *args, **kwargs)
            began = time.perf_counter()
            try:
                return original(work, *args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(dist.Work, "wait", wait)  # noqa: B010  # a method of a native class, which mypy protects
        try:
            yield self
        finally:
            setattr(dist.Work, "wait", original)  # noqa: B010


class Reading(NamedTuple):
    """What a rank tells of a window of steps.

    Attributes:
        window: counts them; the first is 1.
        steps: in it.
        host: of the rank.
        seconds: median that it worked in a step.
        load: tokens that its experts got / the mean of all ranks; 1 without expert parallelism.
    """

    window: int
    steps: int
    host: str
    seconds: float
    load: float

    @property
    def comparable(self) -> float:
        """Seconds that it would have worked with no more tokens than the others."""
        return self.seconds / max(1.0, self.load)


@dataclass(frozen=True)
class Notice:
    """Something to tell of a rank.

    Attributes:
        slow: it is a straggler; False: it is one no longer.
        began: unix time since which it was slow and this was not told yet.
    """

    rank: int
    host: str
    slow: bool
    message: str
    evidence: str
    began: float


@dataclass
class _Suspicion:
    """Of one rank: windows in a row that contradict what is said of it, and since when.

    Attributes:
        named: unix time of its naming; None: it is not.
        told: until when its slowness is told.
        again: when it is told again that it is still slow.
    """

    windows: int = 0
    since: float = 0.0
    named: float | None = None
    told: float = 0.0
    again: float = math.inf


class Judge:
    """Decides who is a straggler: who works more than ``factor`` times the median rank, three windows running.

    The median of an even number of ranks is the lower one, so that of two ranks one can be the slow one.

    Args:
        factor: above 1.
        now: unix time.
    """

    def __init__(self, factor: float, now: float) -> None:
        self.factor = factor
        self.worst = 1.0
        self._last = now
        self._suspicions: dict[int, _Suspicion] = {}

    def look(self, readings: Mapping[int, Reading], now: float) -> list[Notice]:
        """Take in a newer reading of every rank; whom there is something to tell of."""
        median = statistics.median_low(reading.comparable for reading in readings.values())
        self.worst = max(reading.comparable for reading in readings.values()) / max(median, 1e-9)
        notices = []
        for rank, reading in readings.items():
            slow = reading.comparable > self.factor * median
            if slow or rank in self._suspicions:
                found = self._consider(rank, reading, slow, readings, now)
                notices += [] if found is None else [found]
        self._last = now
        return notices

    def still_slow(self, readings: Mapping[int, Reading], now: float) -> list[Notice]:
        """At the end of a run: of those that are named, what is not told yet."""
        named = [(rank, one) for rank, one in self._suspicions.items() if one.named is not None]
        return [self._notice(rank, readings, one.told, True) for rank, one in named]

    def _consider(
        self, rank: int, reading: Reading, slow: bool, readings: Mapping[int, Reading], now: float
    ) -> Notice | None:
        one = self._suspicions.setdefault(rank, _Suspicion(since=self._last))
        if slow == (one.named is not None):  # as it is known
            one.windows = 0
            if one.named is None:
                del self._suspicions[rank]
                return None
            if now < one.again:
                return None
            began, one.told, one.again = one.told, now, now + (now - one.named)
            return self._notice(rank, readings, began, True)
        one.windows += 1
        if one.windows < _WINDOWS:
            return None
        if not slow:
            del self._suspicions[rank]
            return self._notice(rank, readings, one.told, False)
        one.windows, one.named, one.told = 0, now, now
        one.again = now + max(now - one.since, 10 * _LOOK_SECONDS)
        return self._notice(rank, readings, one.since, True)

    def _notice(self, rank: int, readings: Mapping[int, Reading], began: float, slow: bool) -> Notice:
        mine = readings[rank]
        median = statistics.median_low(reading.comparable for reading in readings.values())
        times = f"{mine.comparable / max(median, 1e-9):.1f} times as long as the median rank"
        span = f"over {mine.steps} steps: {mine.seconds:.3g} s a step beside {median:.3g} s"
        who = f"rank {rank} on {mine.host}"
        message = (
            f"{who} works {times} {span}" if slow else f"{who} is no longer slow: it works {times} {span}"
        )
        order = sorted(readings.items(), key=lambda item: -item[1].comparable)
        lines = [
            f"rank {other} on {told.host}: works {told.seconds:.4g} s a step, load {told.load:.2f}"
            for other, told in order[:_MAX_LISTED]
        ]
        if len(order) > _MAX_LISTED:
            lines.append(f"and {len(order) - _MAX_LISTED} faster ones")
        return Notice(rank, mine.host, slow, message, "\n".join(lines), began)


class Stragglers:
    """One rank's part: it tells how long it works; rank 0 compares.

    Args:
        config: resolved, with ``resilience.straggler_factor`` above 0.
        ep_rank: of this rank.
        store: of all ranks, with a prefix of its own for this launch.
        run_dir: of the run.
        clock: of the thread that trains.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        world_size: int,
        ep_rank: int,
        store: dist.Store,
        run_dir: Path,
        clock: WaitClock,
    ) -> None:
        self._config, self._rank, self._ep_rank, self._run_dir = config, rank, ep_rank, run_dir
        self._keys = [f"work-{other}" for other in range(world_size)]
        # A connection of its own: the training's may be waiting inside it.
        self._store: dist.Store = store.clone()  # type: ignore[attr-defined]  # missing in the stubs
        self._store.set_timeout(timedelta(seconds=_STORE_SECONDS))
        self._clock, self._began, self._waited = clock, 0.0, 0.0
        self._seconds: list[float] = []
        self._opened = time.perf_counter()
        self._counts_LE: Tensor | None = None
        self._reading: Reading | None = None
        self._told, self._looked = 0, time.monotonic()
        self._judge = Judge(config.resilience.straggler_factor, time.time())
        self._readings: dict[int, Reading] = {}
        self._notices: deque[Notice] = deque()
        self._host = socket.gethostname()

    def begin(self) -> None:
        """A step begins."""
        self._began, self._waited = time.perf_counter(), self._clock.seconds

    def stepped(self, counts_LE: Tensor | None) -> None:
        """It is done; ``counts_LE``: routed pairs of each expert, over all ranks, on the CPU."""
        now, waited = time.perf_counter(), self._clock.seconds - self._waited
        self._seconds.append(now - self._began - waited)
        if counts_LE is not None and len(counts_LE):
            self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE + counts_LE
        seconds, steps = now - self._opened, len(self._seconds)
        if steps < _LEAST_STEPS or seconds < self._config.resilience.straggler_seconds:
            return
        window = 1 if self._reading is None else self._reading.window + 1
        self._reading = Reading(window, steps, self._host, statistics.median(self._seconds), self._load())
        self._seconds, self._counts_LE, self._opened = [], None, now

    def _load(self) -> float:
        if self._counts_LE is None:
            return 1.0
        share_LR = rank_shares(self._config, self._counts_LE)
        return 1.0 if share_LR is None else float(share_LR[:, self._ep_rank].mean() * share_LR.shape[1])

    def look(self, vitals: Vitals) -> None:
        """Called by the thread that beats: tell this rank's newest window; on rank 0, compare all ranks'."""
        reading = self._reading
        if reading is None:
            return
        try:
            if reading.window > self._told:
                self._store.set(self._keys[self._rank], json.dumps(reading))
                self._told = reading.window
            now = time.monotonic()
            if self._rank == 0 and self._newer(0, reading) and now - self._looked >= _LOOK_SECONDS:
                self._looked = now
                self._compare()
        except (
            RuntimeError
        ):  # the store's host is gone: others deal with that, and nothing is left to compare
            return

    def _compare(self) -> None:
        if not self._store.check(self._keys):
            return
        told = self._store.multi_get(self._keys)
        readings = {rank: Reading(*json.loads(text)) for rank, text in enumerate(told)}
        if all(self._newer(rank, reading) for rank, reading in readings.items()):
            self._readings = readings
            self._notices += self._judge.look(readings, time.time())

    def _newer(self, rank: int, reading: Reading) -> bool:
        """Whether this window of a rank was not judged yet."""
        return not self._readings or reading.window > self._readings[rank].window

    def metrics(self) -> dict[str, float]:
        """Of a logged step, once there is something to compare."""
        return {"perf/rank_work_max_over_median": self._judge.worst} if self._readings else {}

    def alarms(self) -> list[dict[str, Any]]:
        """Fields of the events ``alarm`` that are due. On rank 0; others find nothing.

        Raises:
            NamedFailure: of a straggler that is to be replaced.
        """
        notices = [self._notices.popleft() for _ in range(len(self._notices))]
        for notice in notices:
            if notice.slow and self._replaces(notice.host):
                raise NamedFailure(
                    "straggler", notice.message, notice.rank, notice.host, notice.began, notice.evidence
                )
        return [_alarm(notice) for notice in notices]

    def last_alarms(self) -> list[dict[str, Any]]:
        """The same at the end of the run; where nothing is due, of those who are slow still."""
        notices = list(self._notices)
        if not notices and self._readings:
            notices = self._judge.still_slow(self._readings, time.time())
        self._notices.clear()
        return [_alarm(notice) for notice in notices]

    def _replaces(self, host: str) -> bool:
        if self._config.resilience.straggler_action is not StragglerAction.replace:
            return False
        events = read_events(self._run_dir / EVENTS_FILE)
        kinds = [(event.get("kind"), event.get("host")) for event in events if event["event"] == "failure"]
        return kinds.count(("straggler", host)) < _MAX_REPLACED


def _alarm(notice: Notice) -> dict[str, Any]:
    fields = {name: getattr(notice, name) for name in ("rank", "host", "message", "evidence", "began")}
    return {"kind": "straggler", **fields}


def compares_ranks(config: RunConfig, world_size: int) -> bool:
    """Not where there is one rank, it is off, or the host does not wait for its device."""
    return config.resilience.straggler_factor > 0 and world_size > 1 and config.device is Device.cpu
