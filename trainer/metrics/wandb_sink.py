"""Weights & Biases as one more reader of a run: offline by default, and never able to stop it.

W&B's files are written in blocks, and a kill loses the last one; metrics.jsonl is the truth.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.metrics.schema import Record, load_layer
from trainer.metrics.text import event_text

Alarm = Callable[[str, str], None]
"""Called with (kind, message) when W&B fails."""

_INIT_TIMEOUT_SECONDS = 30.0


class WandbSink:
    """Writes records and events to a W&B run under ``run_dir/wandb``.

    Whatever goes wrong inside W&B is told once through ``on_alarm``; from then on the sink does nothing. With
    ``mode="disabled"`` wandb is not even imported. ``mode="online"`` without a stored login, or without a
    network, goes on offline. Nothing here ever asks a question or writes to the console.

    Args:
        run_dir: of this run.
        mode: ``offline``, ``online`` or ``disabled``.
        run_id: the same in every generation, so that a restart goes on with the same W&B run.
        project, name, group, entity: as W&B shows them.
        config: the resolved config as plain values.
        on_alarm: told of the first failure, e.g. to write an ``alarm`` event.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: str,
        run_id: str,
        project: str,
        name: str,
        group: str | None = None,
        entity: str | None = None,
        config: Mapping[str, Any] | None = None,
        on_alarm: Alarm,
    ) -> None:
        self._run: Any = None
        self._on_alarm = on_alarm
        if mode == "disabled":
            return
        try:
            self._run = _init(
                run_dir, mode, on_alarm,
                id=run_id, project=project, name=name, group=group, entity=entity, config=dict(config or {}),
            )  # fmt: skip
            # A rollback repeats steps, and W&B's own step only grows: ours is an ordinary value and the axis.
            self._run.define_metric("step")
            self._run.define_metric("tokens")
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # any failure of W&B costs its plots, never the run
            self._fail(error)

    def metrics(self, record: Record) -> None:
        """Log one metrics record; expert loads become histograms with one bin an expert."""
        if self._run is not None:
            self._guard(lambda: self._run.log({name: _value(name, value) for name, value in record.items()}))

    def event(self, event: Record) -> None:
        """Failures, alarms and cures become W&B alerts, validation results part of the summary."""
        if self._run is None:
            return
        name = event["event"]
        if name in ("failure", "alarm", "cure"):
            text = f"step {event['step']}: {event_text(event)}"
            title = f"{name}: {event['kind']}" if "state" in event else name
            level = "INFO" if name == "cure" or event.get("state") == "cleared" else "WARN"
            self._guard(lambda: self._run.alert(title=title, text=text, level=level))
        elif name == "finish":
            summary = {
                key: value for key, value in event.items() if key not in ("event", "time", "step", "sample")
            }
            self._guard(lambda: self._run.summary.update(summary))

    def close(self, exit_code: int = 0) -> None:
        """End this generation's part of the W&B run and flush its file."""
        if self._run is not None:
            self._guard(lambda: self._run.finish(exit_code=exit_code))
            self._run = None

    def _guard(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # any failure of W&B costs its plots, never the run
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._run = None
        self._on_alarm("wandb", f"W&B logging is off from here on; metrics.jsonl is complete. {error!r}")


def _init(run_dir: Path, mode: str, on_alarm: Alarm, **settings: Any) -> Any:
    # Offline must mean no traffic at all, error reports included. Read when wandb is imported.
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    def start(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            dir=run_dir,
            mode=mode,
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_INIT_TIMEOUT_SECONDS,
                disable_git=True,
                save_code=False,
            ),
            **settings,
        )

    if mode == "online":
        try:
            if not wandb.login(prompt=False, verify=False):
                raise RuntimeError("no stored login; `wandb login` makes one")
            return start("online")
        except Exception as error:  # no login, no network, a proxy's refusal, …: all are answered alike
            on_alarm("wandb", f"not reachable, going on offline: {error!r}")
    return start("offline")


def _value(name: str, value: Any) -> Any:
    if load_layer(name) is None or len(value) == 0:
        return value
    import wandb

    # W&B takes at most 512 bins; neighbours share one where there are more experts.
    load = np.asarray(value, dtype=np.float64)
    width = -(-len(load) // 512)
    bins = np.add.reduceat(load, np.arange(0, len(load), width))
    return wandb.Histogram(np_histogram=(bins, width * np.arange(len(bins) + 1)))


def sync_hint(run_dir: Path) -> tuple[list[Path], str | None]:
    """The run's offline W&B directories, oldest first, and the line that uploads them; ([], None) if none.

    Every generation has a directory; ``wandb sync`` (0.31) joins those of one run in order of start.
    """
    directories = sorted((run_dir / "wandb").glob("offline-run-*"))
    if not directories:
        return [], None
    return directories, " ".join(["wandb sync", *(shlex.quote(str(path)) for path in directories)])
