"""What the user sees while workers run: the run's own files, followed and shown."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.text import Text

from trainer.config import RunConfig, Terminal
from trainer.metrics.jsonl import Follow
from trainer.metrics.schema import EVENTS_FILE, METRICS_FILE
from trainer.metrics.terminal import TerminalView

_SECONDS = 0.2


class RunView:
    """Shows new records of a run directory from a thread: a blocked terminal never delays the agent.

    What the files hold at the start (a resumed run) is not shown again.
    """

    def __init__(self, run_dir: Path, config: RunConfig, console: Console) -> None:
        self._console = console
        self._follow = (Follow(run_dir / EVENTS_FILE), Follow(run_dir / METRICS_FILE))
        for follow in self._follow:
            follow.poll()
        self._view: TerminalView | None = None
        if config.logger.terminal is not Terminal.off:
            name = f"{config.run.name}/{config.run.id}"
            self._view = TerminalView(config.logger.terminal.value, config.train.steps, console, name=name)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="muster-view", daemon=True)

    def say(self, line: str) -> None:
        """Print a line above the live view."""
        self._console.print(Text(line), soft_wrap=True)

    def _run(self) -> None:
        try:
            while not self._ended.wait(_SECONDS):
                self._show()
            self._show()
        except Exception as error:
            self.say(f"the terminal view stopped ({type(error).__name__}: {error}); training goes on")
            self._view = None

    def _show(self) -> None:
        events, metrics = self._follow
        for event in events.poll():
            if self._view is not None:
                self._view.event(event)
        for record in metrics.poll():
            if self._view is not None:
                self._view.metrics(record)

    def __enter__(self) -> RunView:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=5.0)
        if self._view is not None:
            self._view.close()
        for follow in self._follow:
            follow.close()
