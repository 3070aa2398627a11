"""Callbacks of the tests of tiers: faults at a given step, once the snapshot before it is sealed everywhere."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from tests.commands.watch import wait_until
from trainer.callbacks import Callback
from trainer.checkpoint.slots import HEADER_BYTES, Header
from trainer.data.batch import Batch
from trainer.loop import Trainer


def sealed_steps(folder: Path, rank: int, kind: str = "rank") -> dict[Path, int]:
    """The slots of a rank that are sealed, with their steps."""
    found = {}
    for path in folder.glob(f"{kind}-{rank:05d}.*-*"):
        with path.open("rb") as file:
            header = Header.parse(file.read(HEADER_BYTES))
        if header is not None:
            found[path] = header.step
    return found


def damage(path: Path) -> None:
    """Flip one bit of a slot's tensors."""
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + 100)
        byte = file.read(1)[0]
        file.seek(HEADER_BYTES + 100)
        file.write(bytes([byte ^ 8]))


class Kills(Callback):
    """Each of them once, in the step after ``step`` ones. Nothing writes the state, as far as the run knows.

    Args:
        folder: for marks.
        kill: [step, rank] of ranks that SIGKILL themselves.
        damage: the same, with a bit of the newest snapshot flipped before.
    """

    def __init__(
        self, folder: str, kill: list[list[int]] | None = None, damage: list[list[int]] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.kill, self.damage = kill or [], damage or []

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        if trainer.num_restores and trainer.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        here = [trainer.state.step, trainer.rank]
        damaging = here in self.damage
        if (here in self.kill or damaging) and self._first(f"dead-{here[0]}-{here[1]}"):
            assert trainer.memory is not None
            folder = trainer.memory.lease.folder
            for rank in range(trainer.dims.world_size):
                wait_until(
                    lambda rank=rank: here[0] in sealed_steps(folder, rank).values(), f"slots of {rank}"
                )
            if damaging:
                newest = max(sealed_steps(folder, trainer.rank).items(), key=lambda item: item[1])[0]
                damage(newest)
            os.kill(os.getpid(), signal.SIGKILL)

    def _first(self, mark: str) -> bool:
        self.folder.mkdir(exist_ok=True)
        if (self.folder / mark).exists():
            return False
        (self.folder / mark).touch()
        return True


class Faults(Kills):
    """With a hook that may write the state.

    Args:
        restore: [step, at_most]: the run goes back after that step, and rank 1 dies in the next one.
    """

    def __init__(
        self,
        folder: str,
        kill: list[list[int]] | None = None,
        damage: list[list[int]] | None = None,
        restore: list[list[int]] | None = None,
    ) -> None:
        super().__init__(folder, kill, damage)
        self.restore = restore or []

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> dict[str, float] | None:
        for step, at_most in self.restore:
            if trainer.state.step == step and self._first(f"restored-{step}-{trainer.rank}"):
                trainer.restore(at_most, reason="the test asks for it")
                break
        return None
