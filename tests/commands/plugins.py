"""Callbacks that disturb a run at a step, and what else the tests of commands plug in by dotted path."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

from tests.commands.watch import wait_until
from trainer.callbacks import Callback
from trainer.data.batch import Batch
from trainer.loop import Trainer


def entry(target: str, **kwargs: object) -> str:
    """An entry of ``callbacks`` in Hydra's grammar, whose keys carry no quotes; of this module by its name."""
    path = target if ":" in target else f"tests.commands.plugins:{target}"
    values = ", ".join(f"{key}: {json.dumps(value)}" for key, value in kwargs.items())
    return f'{{target: "{path}", kwargs: {{{values}}}}}'


class SignalAgent(Callback):
    """Rank 0 signals the agent once, in the step that begins after ``step`` ones; the file is the mark.

    It then waits until the agent has asked this worker to stop, so the run ends after exactly that step.

    Args:
        number: of the signal; to the agent's whole process group, as a terminal's Ctrl-C goes.
        again: send it a second time and never leave the step.
    """

    def __init__(self, step: int, number: int, mark: str, again: bool = False) -> None:
        self.at, self.number, self.mark, self.again = step, number, Path(mark), again

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        if trainer.rank or trainer.state.step != self.at or self.mark.exists():
            return
        self.mark.touch()
        group = int(os.environ["MUSTER_AGENT_PID"])
        assert os.getpgid(group) == group, "the agent needs a group of its own, or others get the signal"
        os.killpg(group, self.number)
        if self.number == signal.SIGKILL:
            signal.pause()
        wait_until(trainer.stepper.wants_stop, "the agent's request to stop")
        if self.again:
            os.killpg(group, self.number)
            signal.pause()


class FillDisk(Callback):
    """Rank 0 fills the run's disk up to ``leave`` bytes, in the step after ``step`` ones.

    With ``free_at`` it keeps the disk full (others free a page now and then: a file replaced, a save given
    up) and makes room again in the step after so many, when a save has failed meanwhile.
    """

    def __init__(self, step: int, leave: int, ballast: str, committed: int, free_at: int = -1) -> None:
        self.at, self.leave, self.ballast, self.committed = step, leave, Path(ballast), committed
        self.free_at = free_at

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        if trainer.rank:
            return
        if trainer.state.step == self.at:
            wait_until(lambda: trainer.checkpoints.committed(self.committed), "the first checkpoint")
        if trainer.state.step == self.at or self.at < trainer.state.step < self.free_at:
            fill(self.ballast, self.leave)
        if trainer.state.step == self.free_at:
            wait_until(lambda: trainer.checkpoints.error is not None, "a save that fails")
            self.ballast.unlink()


def fill(ballast: Path, leave: int) -> None:
    """Write a file beside others until only ``leave`` bytes are free there."""
    size = shutil.disk_usage(ballast.parent).free - leave
    try:
        with ballast.open("ab") as file:
            file.write(b"x" * size)
    except OSError as error:  # somebody was quicker: it is full
        if error.errno != errno.ENOSPC:
            raise


class Collapse(Callback):
    """From the start the last layer's routers send every token to experts 0 and 1 (with a bias on the choice)."""

    def on_start(self, trainer: Trainer) -> None:
        biases = [piece for piece in trainer.engine.named_state() if piece.name.endswith(".bias_E")]
        assert len(biases) == trainer.config.model.num_layers
        biases[-1].tensor.zero_()
        biases[-1].tensor[:2] = 100.0
