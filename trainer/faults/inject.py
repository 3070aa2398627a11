"""Lets the faults of a schedule strike in one process, each once."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from trainer.faults.kinds import KINDS, Fault, read_schedule
from trainer.faults.strikes import STRIKES, kill_self, ready

if TYPE_CHECKING:
    from trainer.loop import Trainer
    from trainer.run import Place


@dataclass(frozen=True)
class Scene:
    """What a strike may use.

    Attributes:
        index: of the fault in its schedule.
        step: optimizer steps done.
        facts: what the point offers.
    """

    index: int
    fault: Fault
    step: int
    facts: Mapping[str, Any]
    injector: Injector

    @property
    def trainer(self) -> Trainer:
        return self.injector.trainer


class Injector:
    """The faults of one rank; those of ranks that the run goes on without are the last rank's.

    A fault makes its mark, ``<run>/faults/INDEX.json``, by an exclusive create before it strikes: a step that is
    computed again does not meet it again, in this process or another.

    Attributes:
        folder: ``<run>/faults``.
        slow_until: steps before this one are slow.
    """

    def __init__(self, schedule: Path, trainer: Trainer, place: Place) -> None:
        self.folder, self.trainer, self.generation = schedule.parent, trainer, place.generation
        self.step = 0
        self.slow_until = -1
        self._claims = threading.Lock()  # saves are written by a thread of their own
        everyone = enumerate(read_schedule(schedule))
        self._mine = {
            index: fault for index, fault in everyone if min(fault.rank, place.world_size - 1) == place.rank
        }
        self._pending = {i: fault for i, fault in self._mine.items() if not self._mark(i).exists()}
        aside = self.folder / f".rank-{place.rank}.json"
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "generation": place.generation}
        aside.write_text(json.dumps(facts))
        aside.replace(self.folder / f"rank-{place.rank}.json")
        if any(fault.point == "exchange" for fault in self._pending.values()):
            self._watch_exchange(trainer.engine.model)

    def _mark(self, index: int, suffix: str = "") -> Path:
        return self.folder / f"{index:04d}{suffix}.json"

    def _watch_exchange(self, model: nn.Module) -> None:
        """See the rows that the first MoE layer's experts receive."""
        from trainer.moe.layer import MoeLayer

        for module in model.modules():
            if isinstance(module, MoeLayer):
                module.experts.register_forward_pre_hook(
                    lambda module, args: self.reach("exchange", self.step, {"rows": args[0]})
                )
                return

    def reach(self, point: str, step: int, facts: Mapping[str, Any]) -> None:
        """Strike with what is due at this point."""
        if point == "batch":
            self.step = step
        if point == "forward" and step < self.slow_until:
            time.sleep(0.5)
        if point in ("load", "batch"):  # where nothing was saved, nothing is loaded
            self._strike_again(step)
        for index, fault in list(self._pending.items()):
            kind = KINDS[fault.kind]
            if fault.point != point or not (step == fault.step or (kind.waits and step > fault.step)):
                continue
            scene = Scene(index, fault, step, facts, self)
            if ready(scene) and self._claim(index, step):
                STRIKES[fault.kind](scene)

    def _strike_again(self, step: int) -> None:
        for index, fault in self._mine.items():
            if (
                fault.kind == "kill-twice"
                and self._mark(index).exists()
                and self._claim(index, step, "-again")
            ):
                kill_self()

    def _claim(self, index: int, step: int, suffix: str = "") -> bool:
        """Whether this process is the one that strikes."""
        with self._claims:
            self._pending.pop(index, None)
        facts = {
            "time": time.time(),
            "step": step,
            "rank": self.trainer.rank,
            "host": socket.gethostname(),
            "generation": self.generation,
        }
        try:
            descriptor = os.open(self._mark(index, suffix), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(facts) + "\n")
        return True
