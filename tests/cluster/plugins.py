"""Callbacks that the cluster tests plug in by dotted path."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

from tests.commands.watch import wait_until
from trainer.callbacks import Callback
from trainer.data.batch import Batch
from trainer.loop import Trainer


class Hold(Callback):
    """Rank 0 waits once, in the step after ``step`` ones, until its agent asks it to stop; the file is the mark.

    Args:
        limited: let the job reach its time limit here. Slurm looks at limits twice a minute, so a job that had a
            short one from the beginning could be signalled before its agents are there.
        forever: never leave the step.
    """

    def __init__(self, step: int, mark: str, limited: bool = False, forever: bool = False) -> None:
        self.at, self.mark, self.limited, self.forever = step, Path(mark), limited, forever

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        if trainer.rank or trainer.state.step != self.at or self.mark.exists():
            return
        self.mark.touch()
        while self.forever:
            signal.pause()
        if self.limited:
            set_time_limit(minutes_run() + 2)
        wait_until(trainer.stepper.wants_stop, "the agent's request to stop")
        if self.limited:
            set_time_limit(60)  # enough for the next start


def minutes_run() -> int:
    """Whole minutes since this job was started."""
    job = _scontrol("show", "job", os.environ["SLURM_JOB_ID"])
    found = re.search(r"RunTime=(\d+):(\d+):\d+", job)
    assert found is not None, job
    return int(found[1]) * 60 + int(found[2])


def set_time_limit(minutes: int) -> None:
    """Of this job."""
    _scontrol("update", f"jobid={os.environ['SLURM_JOB_ID']}", f"timelimit={minutes}")


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout


class Gate(Callback):
    """Rank 0 waits before each of the steps: ``at-STEP`` says it is there, ``go-STEP`` or a stop lets it go on."""

    def __init__(self, folder: str, steps: list[int]) -> None:
        self.folder, self.steps = Path(folder), steps

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        step = trainer.state.step
        if trainer.rank or step not in self.steps or (self.folder / f"go-{step}").exists():
            return
        (self.folder / f"at-{step}").touch()
        leave = self.folder / f"go-{step}"
        wait_until(lambda: leave.exists() or trainer.stepper.wants_stop(), f"leave to go on from step {step}")
