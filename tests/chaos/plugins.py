"""Callbacks that tests plug in by dotted path."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from tests.commands.watch import wait_until
from trainer.callbacks import Callback
from trainer.data.batch import Batch
from trainer.loop import Trainer


class RecordSamples(Callback):
    """Appends {step, samples} of every step this rank begins to a file of its own."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        self.folder.mkdir(exist_ok=True)
        samples = [int(i) for batch in batches for i in batch.sample_ids]
        with (self.folder / f"rank-{trainer.rank}.jsonl").open("a") as file:
            file.write(json.dumps({"step": trainer.state.step, "samples": samples}) + "\n")


class KillAt(Callback):
    """SIGKILLs its own process once at each given (step, rank), in the middle of the step.

    With ``every``, not before the last checkpoint due by then is committed, so that it is known where the run
    goes on.
    """

    def __init__(self, folder: str, at: list[list[int]], every: int = 0) -> None:
        self.folder = Path(folder)
        self.at = {tuple(pair) for pair in at}
        self.every = every

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        step = trainer.state.step
        if (step, trainer.rank) in self.at:
            self.folder.mkdir(exist_ok=True)
            mark = self.folder / f"killed-{step}-{trainer.rank}"
            if not mark.exists():
                if self.every:
                    due = step - step % self.every
                    wait_until(lambda: trainer.checkpoints.committed(due), f"checkpoint {due}")
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)


class KillAlways(Callback):
    """SIGKILLs its process at every first step."""

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class TerminateAt(Callback):
    """SIGTERMs one rank alone in the middle of a step, as a scheduler may do."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        if (trainer.state.step, trainer.rank) == (self.step, self.rank):
            os.kill(os.getpid(), signal.SIGTERM)


class PoisonAt(Callback):
    """Fills the head with NaN before a step: the model has diverged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        if trainer.state.step == self.step:
            for piece in trainer.engine.named_state():
                if piece.name == "model.head.weight":
                    piece.tensor.fill_(float("nan"))


class SpoilGradients(Callback):
    """Writes NaN into one rank's gradients at a step: once, or whenever it is attempted."""

    def __init__(self, step: int, rank: int, always: bool = False, steps: int = 1) -> None:
        self.steps = range(step, step + steps)
        self.rank, self.always, self.left = rank, always, steps

    def on_gradients(self, trainer: Trainer) -> None:
        if trainer.rank == self.rank and trainer.state.step in self.steps and (self.always or self.left):
            self.left -= 1
            next(iter(trainer.engine.named_gradients())).tensor.view(-1)[0] = float("nan")


class DecideOnDevice(Callback):
    """Lets the guard decide as where reading a number would make the device wait."""

    def on_start(self, trainer: Trainer) -> None:
        assert trainer.guard is not None
        trainer.guard.on_host = False


class FlipBit(Callback):
    """Flips one bit of one rank's first non-empty weight in the middle of a step, once or at every attempt."""

    def __init__(self, step: int, rank: int, always: bool = False) -> None:
        self.step, self.rank, self.left = step, rank, 1000 if always else 1

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        if (trainer.state.step, trainer.rank) == (self.step, self.rank) and self.left:
            self.left -= 1
            weights = (p for p in trainer.engine.named_state() if p.name.startswith("model.layers"))
            part = next(part for part in weights if part.tensor.numel())
            part.tensor.view(-1).view(torch.uint8)[5] ^= 1 << 4


class Counter(Callback):
    """Counts steps over restarts and says what it counted; ``name`` tells two of them apart."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def on_step_end(self, trainer: Trainer, metrics: dict[str, Any]) -> dict[str, float]:
        self.count += 1
        return {f"user/{self.name}": self.count}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class HangAt(Callback):
    """Stops getting on at each given [step, rank, how], once.

    ``suspend``: SIGSTOP. ``deadlock``: waits for a lock that it holds before the forward pass, while the others
    wait for it in an exchange.
    """

    def __init__(self, folder: str, at: list[list[Any]]) -> None:
        self.folder = Path(folder)
        self.at = {(step, rank): how for step, rank, how in at}

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        how = self.at.get((trainer.state.step, trainer.rank))
        if how is None:
            return
        self.folder.mkdir(exist_ok=True)
        mark = self.folder / f"{how}-{trainer.state.step}-{trainer.rank}"
        if mark.exists():
            return
        mark.touch()
        if how == "suspend":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            trainer.engine.model.register_forward_pre_hook(lambda *arguments: never_get_on())


def never_get_on() -> None:
    """A deadlock."""
    lock = threading.Lock()
    with lock:
        lock.acquire()


class SleepAtWork(Callback):
    """Makes ranks' steps longer; with a folder, only in the run's first process of each."""

    def __init__(self, ranks: list[int], seconds: float, folder: str = "") -> None:
        self.ranks, self.seconds, self.folder = ranks, seconds, folder

    def on_start(self, trainer: Trainer) -> None:
        mark = Path(self.folder) / f"slept-{trainer.rank}"
        if trainer.rank not in self.ranks or (self.folder and mark.exists()):
            self.seconds = 0.0
        elif self.folder:
            mark.parent.mkdir(exist_ok=True)
            mark.touch()

    def on_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        time.sleep(self.seconds)
