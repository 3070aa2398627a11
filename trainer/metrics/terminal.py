"""The terminal while a run goes on: a live view on a terminal, one line a step where output is piped."""

from __future__ import annotations

import atexit
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from trainer.metrics.live import State
from trainer.metrics.schema import Record, as_float
from trainer.metrics.text import count_text, event_line, percent_text, seconds_text

_PLAIN_SECONDS = 2.0
_REFRESH_HZ = 4
_RATE_POINTS = 50


class TerminalView:
    """Shows the records and events of a run as they come. Use as a context manager, or call ``close``.

    Args:
        mode: ``rich`` (live view), ``plain`` (lines, at most one a step and one every two seconds, the first
            and the last step always, every event) or ``auto``: rich on a terminal, else plain.
        total_steps: at which the run ends.
        console: where to write; a new one on stdout by default.
        name: shown above all.
        clock: seconds, for rate limits.

    The live view draws itself from a thread, so start worker processes with ``spawn`` or ``exec`` once it
    runs, or make it after them. ``close`` gives the terminal back; it also runs at interpreter exit.
    """

    def __init__(
        self,
        mode: str,
        total_steps: int,
        console: Console | None = None,
        *,
        name: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert mode in ("auto", "rich", "plain"), mode
        self.console = console or Console(highlight=False)
        self.rich = mode == "rich" or (mode == "auto" and self.console.is_terminal)
        self._clock = clock
        self._state = State(total_steps=total_steps, name=name)
        self._rate = Rate()
        self._last_line: float | None = None
        self._waiting: Record | None = None
        self._live: Live | None = None
        self._changed = clock()

    def metrics(self, record: Record) -> None:
        """Show one metrics record."""
        self._rate.add(record)
        self._state.record(record, self._rate.eta(self._state.total_steps))
        if self.rich:
            self._draw()
            return
        now = self._clock()
        is_first, is_last = self._last_line is None, record["step"] >= self._state.total_steps
        if is_first or is_last or now - (self._last_line or 0.0) >= _PLAIN_SECONDS:
            self._last_line, self._waiting = now, None
            self._print(metrics_line(record, self._state))
        else:
            self._waiting = record

    def event(self, event: Record) -> None:
        """Show one event."""
        if event["event"] in ("start", "resume"):
            # Times before a restart say nothing about the speed after it.
            self._rate.clear()
        self._state.event(event)
        if self.rich:
            self._draw()
        else:
            self._print(event_line(event))

    def close(self) -> None:
        """Draw for the last time and give the terminal back. Safe to call twice."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
            atexit.unregister(self.close)
        if self._waiting is not None:
            # The last step of a run that was stopped before its end.
            self._print(metrics_line(self._waiting, self._state))
            self._waiting = None

    def _draw(self) -> None:
        self._changed = self._clock()
        if self._live is None:
            atexit.register(self.close)
            drawn = _Drawn(self._state, lambda: self._changed, self._clock)
            self._live = Live(drawn, console=self.console, refresh_per_second=_REFRESH_HZ)
            self._live.start()

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> TerminalView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Drawn:
    """Renders the state as it is at each refresh, with the time since it last changed."""

    def __init__(self, state: State, changed: Callable[[], float], clock: Callable[[], float]) -> None:
        self._state, self._changed, self._clock = state, changed, clock

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self._state.idle = self._clock() - self._changed()
        yield self._state


class Rate:
    """Seconds a step over the last records, with evaluations and checkpoints: what is left takes as long."""

    def __init__(self) -> None:
        self._points: deque[tuple[int, float]] = deque(maxlen=_RATE_POINTS)

    def add(self, record: Record) -> None:
        """Count a metrics record."""
        if self._points and record["step"] <= self._points[-1][0]:
            self.clear()
        self._points.append((record["step"], record["time"]))

    def clear(self) -> None:
        """Forget what was seen."""
        self._points.clear()

    def eta(self, total_steps: int) -> float | None:
        """Seconds until ``total_steps``; None before two records."""
        if len(self._points) < 2:
            return None
        (first, since), (last, until) = self._points[0], self._points[-1]
        return max(0.0, (until - since) / (last - first) * max(0, total_steps - last))


def metrics_line(record: Record, state: State) -> str:
    """``step 120/400  loss 4.321  …``: names and their order are stable, what was not logged is left out."""
    parts = [f"step {record['step']}/{state.total_steps}"]
    for label, name, show in _COLUMNS:
        value = record.get(name)
        if value is not None:
            parts.append(f"{label} {show(as_float(value))}")
    if state.eta is not None and record["step"] < state.total_steps:
        parts.append(f"eta {seconds_text(state.eta).replace(' ', '')}")
    return "  ".join(parts)


_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss/train", "{:.3f}".format),
    ("valid", "loss/valid", "{:.3f}".format),
    ("tok/s", "perf/tokens_per_second", count_text),
    ("mfu", "perf/mfu", percent_text),
    ("grad", "grad_norm", "{:.3g}".format),
    ("lr", "optim/lr", "{:.2e}".format),
    ("max/mean", "moe/max_over_mean", "{:.2f}".format),
    ("dropped", "moe/drop_rate", percent_text),
)
