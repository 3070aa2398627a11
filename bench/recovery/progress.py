"""What every contender of bench/survival.py writes after each step, so that one clock reads them all."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.callbacks import Callback

if TYPE_CHECKING:
    from trainer.loop import Trainer


def note(folder: Path, rank: int, step: int) -> None:
    """Say that this process has done ``step`` optimizer steps as ``rank``."""
    line = json.dumps({"time": time.time(), "step": step, "pid": os.getpid()})
    with (folder / f"rank-{rank}.jsonl").open("a") as file:
        file.write(line + "\n")


def read(folder: Path, rank: int) -> list[dict[str, Any]]:
    """All notes of a rank, in order of writing."""
    path = folder / f"rank-{rank}.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class Progress(Callback):
    """Muster's side of it."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        note(self.folder, trainer.rank, trainer.state.step)
