"""What runs on the pool's ranks for the tests of cures: whole workers, and the deaths of some of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from trainer.callbacks import Callback
from trainer.config import RunConfig
from trainer.data.batch import Batch
from trainer.loop import Trainer
from trainer.resilience import StopSignal
from trainer.run import Place, run_worker


class Death(Exception):
    """Of all ranks at once: what is not in a checkpoint is lost."""


class DieAt(Callback):
    """Dies before the step that follows ``step`` ones, once what was to be saved until then is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        if trainer.state.step == self.step:
            trainer.checkpoints.wait()
            raise Death


def work(rank: int, world: int, store: dist.Store, config: RunConfig, run_dir: str, generation: int) -> Any:
    """A worker of a generation of a run. Whether it finished; it may die on purpose."""
    place = Place(rank, rank, world, generation, store, agent=True)
    size, me = str(world), str(rank)  # as launchers say it, for Accelerate
    with patch.dict(os.environ, RANK=me, LOCAL_RANK=me, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size):
        try:
            return run_worker(config, Path(run_dir), place, StopSignal())
        except Death:
            return "died"
