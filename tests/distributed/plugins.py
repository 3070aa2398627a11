"""Callbacks that tests plug into real workers by dotted path."""

from __future__ import annotations

import os
import signal

from trainer.callbacks import Callback
from trainer.data.batch import Batch
from trainer.loop import Trainer


class SuspendAt(Callback):
    """SIGSTOPs one rank before a step (0-based): it lives, answers nothing and ends no connection."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        if (trainer.state.step, trainer.rank) == (self.step, self.rank):
            os.kill(os.getpid(), signal.SIGSTOP)
