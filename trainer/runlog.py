"""Where a run's records and events go: the files, W&B and, without an agent, the terminal. Rank 0 only."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.files import storage_error
from trainer.config import RunConfig, Terminal
from trainer.metrics.goodput import GoodputMeter
from trainer.metrics.jsonl import read_events, read_metrics
from trainer.metrics.patient import PatientWriter
from trainer.metrics.recovery import RecoveryClock, follow
from trainer.metrics.schema import (
    EVENTS_FILE,
    HEALTH_FILE,
    METRICS_FILE,
    check_event,
    check_record,
    interrupts,
    number,
)
from trainer.metrics.terminal import TerminalView
from trainer.metrics.wandb_sink import WandbSink


class RunLog:
    """Writes to every sink. On ranks other than 0 it is made with ``active=False`` and does nothing.

    Args:
        run_dir: of the run.
        config: resolved.
        config_values: the same as plain values, for W&B.
        active: whether this rank logs.
        terminal: whether to show the run here (an agent shows it otherwise).
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        config_values: Mapping[str, Any],
        *,
        active: bool,
        terminal: bool,
    ) -> None:
        self.active = active
        self.run_dir = run_dir
        self._meter: GoodputMeter | None = None
        self._clock: RecoveryClock | None = None
        self._step = 0
        if not active:
            return
        self._metrics = self._patient(METRICS_FILE, check_record)
        self._events = self._patient(EVENTS_FILE, check_event)
        self._health: PatientWriter | None = None
        self._full = False
        self._view: TerminalView | None = None
        self._wandb: WandbSink | None = None
        self._early: list[tuple[str, str]] = []
        self.wandb_id = _wandb_id(config, read_events(run_dir / EVENTS_FILE))
        if terminal and config.logger.terminal is not Terminal.off:
            self._view = TerminalView(
                config.logger.terminal.value, config.train.steps, name=f"{config.run.name}/{config.run.id}"
            )
        wandb = config.logger.wandb
        self._wandb = WandbSink(
            run_dir,
            mode=wandb.mode.value,
            run_id=self.wandb_id,
            project=wandb.project,
            name=f"{config.run.name}/{config.run.id}",
            group=config.run.group,
            entity=wandb.entity,
            config=config_values,
            on_alarm=self._alarm,
        )

    def _patient(self, name: str, check: Callable[[Mapping[str, Any]], None] | None) -> PatientWriter:
        return PatientWriter(self.run_dir / name, check, self._refused, self._relieved)

    def _refused(self, path: Path, reason: str) -> None:
        if not self._full:  # the files are on one disk: said once
            self._full = True
            self._alarm("log_storage", f"{path} cannot be written: {reason}; its lines wait in memory")

    def _relieved(self, path: Path, num_lines: int) -> None:
        if self._full and all(writer.flush() for writer in self._writers()):
            self._full = False
            self._alarm("log_storage", f"{path} is written again; {num_lines} lines had waited")

    def _writers(self) -> list[PatientWriter]:
        return [writer for writer in (self._events, self._metrics, self._health) if writer is not None]

    def _alarm(self, kind: str, message: str) -> None:
        if self._meter is None:
            self._early.append((kind, message))  # written once this generation's `start` is
        else:
            self.event("alarm", self._step, kind=kind, message=message)

    def begin(self, step: int, start: Mapping[str, Any], resume: Mapping[str, Any] | None) -> None:
        """Open a generation at ``step``: forget records of later steps, write ``start`` and ``resume``."""
        if not self.active:
            return
        self._step = step
        restart = self._restart(step, int(start["generation"]))
        self._clock = self._recoveries()
        self._forget_after(step)
        self.event("start", step, **start, wandb_id=self.wandb_id)
        if restart is not None:
            self.event("restart", step, **restart)
        if resume is not None:
            self.event("resume", step, **resume)
        if self._events.num_waiting:  # a generation that cannot say that it began should not
            raise self._events.error()
        # Only now are the files as the meter wants them.
        self._meter = GoodputMeter(
            read_events(self.run_dir / EVENTS_FILE), read_metrics(self.run_dir / METRICS_FILE)
        )
        for kind, message in self._early:
            self._alarm(kind, message)

    def _recoveries(self) -> RecoveryClock:
        """The clock at the end of the generation before, with the steps that are forgotten next."""
        records = read_metrics(self.run_dir / METRICS_FILE)
        seconds = [number(record.get("perf/step_seconds")) for record in records]
        mean = sum(seconds) / len(seconds) if seconds else 0.0
        return follow(read_events(self.run_dir / EVENTS_FILE), records, mean)

    def roll_back(self, step: int, fields: Mapping[str, Any]) -> None:
        """The run went back to ``step`` in this process: forget records of later steps, write ``rollback``."""
        if not self.active:
            return
        self._step = step
        self._forget_after(step)
        self.event("rollback", step, **fields)

    def _forget_after(self, step: int) -> None:
        try:
            self._metrics.truncate_after(step)
            if (self.run_dir / HEALTH_FILE).exists():
                if self._health is None:
                    self._health = self._patient(HEALTH_FILE, None)
                self._health.truncate_after(step)
        except OSError as error:
            raise storage_error(error, self._metrics.path, 0, field="run.root") from error

    def _restart(self, step: int, generation: int) -> dict[str, Any] | None:
        """If the generation before this one died: since when, and which of its steps are to be redone."""
        events = read_events(self.run_dir / EVENTS_FILE)
        starts = [index for index, event in enumerate(events) if event["event"] == "start"]
        since = events[starts[-1] :] if starts else []
        if not since or any(event["event"] in ("stop", "finish") for event in since):
            return None
        records = read_metrics(self.run_dir / METRICS_FILE)
        died = next((event["time"] for event in reversed(since) if interrupts(event)), None)
        if died is None:  # nobody watched: it was last seen when it last wrote
            died = max(entry["time"] for entry in (since[-1], *records[-1:]))
        last = max((record["step"] for record in records), default=0)
        return {
            "generation": generation,
            "restart_seconds": time.time() - died,
            "lost_steps": max(0, last - step),
        }

    def event(self, event: str, step: int, **fields: Any) -> None:
        """Write one event to every sink. Raises StorageError if too much waits for the disk already."""
        if not self.active:
            return
        record = {"time": time.time(), "step": step, "event": event, **fields}
        self._events.write(record)
        if self._clock is not None:
            self._clock.event(record)
        if self._meter is not None:
            self._meter.event(record)
        if self._view is not None:
            self._view.event(record)
        if self._wandb is not None:
            self._wandb.event(record)

    def stepped(self, step: int) -> None:
        """A step was done; if it is the one that was reached before a fault, the run has recovered."""
        if self._clock is None:
            return
        recovered = self._clock.step(step, time.time())
        if recovered is not None:
            self.event("recovered", step, **recovered)

    def metrics(self, record: dict[str, Any], step_seconds: float) -> None:
        """Write one logged step. Raises StorageError if too much waits for the disk already.

        Args:
            step_seconds: wall time of the steps since the last one.
        """
        if not self.active:
            return
        assert self._meter is not None, "begin() comes first"
        self._step = record["step"]
        self._meter.steps(record["step"], step_seconds)
        now = time.time()
        record = {**record, "time": now, **self._meter.metrics(now)}
        self._metrics.write(record)
        if self._view is not None:
            self._view.metrics(record)
        if self._wandb is not None:
            self._wandb.metrics(record)

    def health(self, record: dict[str, Any]) -> None:
        """Write one record of the routing's health. Raises StorageError if too much waits for the disk."""
        if not self.active:
            return
        if self._health is None:
            self._health = self._patient(HEALTH_FILE, None)
        self._health.write(record)

    def goodput(self) -> float:
        """So far, 0 to 1."""
        return self._meter.metrics(time.time())["ft/goodput"] if self._meter is not None else 0.0

    def seconds(self) -> float:
        """Wall seconds since the run's first start."""
        events = read_events(self.run_dir / EVENTS_FILE) if self.active else []
        first = next((event["time"] for event in events if event["event"] == "start"), time.time())
        return time.time() - first

    def close(self, complain: bool = True) -> None:
        """Flush and end every sink of this generation.

        Args:
            complain: raise for lines that could not be written; without, another error is on its way.

        Raises:
            StorageError: lines are lost.
        """
        if not self.active:
            return
        if self._view is not None:
            self._view.close()
        if self._wandb is not None:
            self._wandb.close()
        for writer in self._writers():
            writer.flush()
        for writer in self._writers():
            writer.close()
        lost = next((writer for writer in self._writers() if writer.num_waiting), None)
        if complain and lost is not None:
            raise lost.error()


def _wandb_id(config: RunConfig, events: Sequence[Mapping[str, Any]]) -> str:
    """The W&B id of a run: what its first start chose, so that every generation goes on with it."""
    known = next((event["wandb_id"] for event in events if "wandb_id" in event), None)
    readable = re.sub(r"[^A-Za-z0-9_-]", "-", f"{config.run.name}-{config.run.id}")[:48]
    return known or f"{readable}-{secrets.token_hex(4)}"
