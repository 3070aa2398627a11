"""Signs of life and progress of a worker, in a page of memory that its supervisor reads.

Two things are told apart. *Liveness*: a thread beats several times a second; it stops when the process is
suspended. *Progress*: the training says which phase it comes to, and by when it must have come to the next one.
The deadline of a phase that recurs in every step is learned from the run; in all others, where anything may
happen (a load, a hook of the user's, an evaluation), a rank has as long as others would wait for it.

No collective, no lock, no file on a disk: the supervisor sees the page of a process that can do nothing any more.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

STACKS_SIGNAL = signal.SIGUSR2
"""A worker answers it with the stacks of all its threads, on stderr."""
PHASES = ("start", "agree", "data", "hooks", "compute", "evaluation", "checkpoint", "sample", "finish")
_LEARNED = ("data", "compute")
"""Phases of every step in which only our own code runs, for about as long every time."""
_BEAT_SECONDS = 0.25
_WINDOW = 32
_ENOUGH = 16
"""Times that a phase is timed before it has a deadline of its own: the first steps build and warm up."""
_SECOND = 1_000_000_000
_BYTES = 4096


class Vitals(NamedTuple):
    """What a page says. Times are of the monotonic clock, in nanoseconds; 0: never.

    Attributes:
        beat: of the last beat.
        progress: when it last came to another phase or collective.
        deadline: by when it must come to another phase.
        step: the one it is in, counted from 1; 0 before the first.
        phase: index into :data:`PHASES`.
        collectives: begun since its start, over all groups.
        committed: newest step whose state is complete in any tier.
    """

    beat: int = 0
    progress: int = 0
    deadline: int = 0
    step: int = 0
    phase: int = 0
    collectives: int = 0
    committed: int = 0

    def __str__(self) -> str:
        return f"step {self.step}, {PHASES[self.phase]}, {self.collectives} collectives"


class Page:
    """A page of shared memory. Each field is one aligned word: it is written and read whole."""

    def __init__(self, descriptor: int) -> None:
        self._words = memoryview(mmap.mmap(descriptor, _BYTES)).cast("q")

    def read(self) -> Vitals:
        """What it says now."""
        return Vitals(*self._words[: len(Vitals._fields)].tolist())

    def set(self, field: str, value: int) -> None:
        """Write one field."""
        self._words[Vitals._fields.index(field)] = value


def page_file() -> int:
    """A descriptor of an empty page without a name, off any disk where the system has such."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("muster-page")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, _BYTES)
    return descriptor


class Pulse:
    """A worker's side.

    Args:
        page: of the supervisor; None: nobody reads it but this process.

    Attributes:
        watchers: called by the beating thread, at every beat.
    """

    def __init__(self, page: Page | None = None) -> None:
        if page is None:
            descriptor = page_file()
            page = Page(descriptor)
            os.close(descriptor)
        self.page = page
        self.watchers: list[Callable[[Vitals], None]] = []
        self._seconds: dict[str, deque[float]] = {name: deque(maxlen=_WINDOW) for name in _LEARNED}
        self._longest = dict.fromkeys(_LEARNED, 0.0)
        self._recalled: Mapping[str, float] = {}
        self._patience, self._floor, self._factor = 0.0, 0.0, 0.0
        self._phase, self._entered, self._collectives = "start", time.monotonic_ns(), 0
        self._counts = False

    @classmethod
    def of_agent(cls) -> Pulse:
        """With the page that the agent named in the environment, if there is an agent."""
        path = os.environ.get("MUSTER_PAGE")
        if path is None:
            return cls()
        descriptor = os.open(path, os.O_RDWR)
        try:
            return cls(Page(descriptor))
        finally:
            os.close(descriptor)

    def start(self) -> None:
        """Beat, from a thread of its own, and answer :data:`STACKS_SIGNAL`, to the end of the process."""
        with suppress(ValueError, OSError):  # no stderr: nothing to write stacks to
            faulthandler.register(STACKS_SIGNAL, all_threads=True)
        self._beat()
        threading.Thread(target=self._run, name="muster-pulse", daemon=True).start()

    def expect(self, patience_seconds: float, floor_seconds: float, factor: float) -> None:
        """Have deadlines from here on.

        Args:
            patience_seconds: that a phase may take whose length is not known.
            floor_seconds: that any phase may take.
            factor: times its median, that a phase may take whose length is known.
        """
        self._patience, self._floor, self._factor = patience_seconds, floor_seconds, factor
        self._counts = True
        self._set_deadline(time.monotonic_ns())

    def recall(self, longest: Mapping[str, float]) -> None:
        """Go by these lengths (:meth:`learned`, of the process before this one) until this one has its own."""
        self._recalled = longest

    def learned(self) -> dict[str, float]:
        """The longest, in seconds, that each phase took of those times that it had no deadline of its own."""
        return {name: self._longest[name] for name, known in self._seconds.items() if len(known) >= _ENOUGH}

    def enter(self, phase: str, step: int | None = None) -> None:
        """Come to a phase, of another step if one is given."""
        now = time.monotonic_ns()
        if self._phase in self._seconds:
            seconds, known = (now - self._entered) / _SECOND, self._seconds[self._phase]
            if len(known) < _ENOUGH:
                self._longest[self._phase] = max(self._longest[self._phase], seconds)
            known.append(seconds)
        self._phase, self._entered = phase, now
        self.page.set("phase", PHASES.index(phase))
        if step is not None:
            self.page.set("step", step)
        self.page.set("progress", now)
        self._set_deadline(now)

    def commit(self, step: int) -> None:
        """The state of this step is complete in some tier."""
        self.page.set("committed", step)

    def _set_deadline(self, now: int) -> None:
        if self._patience:
            known = self._seconds.get(self._phase, ())
            if len(known) >= _ENOUGH:
                seconds = statistics.median(known) * self._factor
            else:
                seconds = min(self._patience, self._recalled.get(self._phase, self._patience) * self._factor)
            self.page.set("deadline", now + int(max(self._floor, seconds) * _SECOND))

    def _run(self) -> None:
        while True:
            time.sleep(_BEAT_SECONDS)
            self._beat()
            vitals = self.page.read()
            for watcher in self.watchers:
                watcher(vitals)

    def _beat(self) -> None:
        now = time.monotonic_ns()
        if self._counts and (count := num_collectives()) != self._collectives:
            self._collectives = count
            self.page.set("collectives", count)
            self.page.set("progress", now)
        self.page.set("beat", now)


def num_collectives() -> int:
    """Collectives that this process has begun, over all groups: who is behind its peers has begun fewer."""
    dist = sys.modules["torch.distributed"]
    total = 0
    with suppress(RuntimeError):  # a group that is just made, or just destroyed
        for group in list(dist.distributed_c10d._world.pg_map):
            total += group._get_sequence_number_for_group()
    return total
