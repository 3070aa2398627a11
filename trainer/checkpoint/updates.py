"""What each step was given, between two snapshots of everything: its gradients, a third of the bytes or less.

    slot-0   step 8, everything                    a snapshot of step 10 is slot-0 and two updates,
    log-0    step 9, gradients ─┐                  done again by the optimizer that did them first
    log-1    step 10, gradients ┴ of slot-0

The state after an update is a function of the state before it and of the gradients, the learning rate and whether
the step committed; so it is not kept (arXiv:2509.04084 keeps compressed gradients so). Whatever else writes weights
or optimizer state ends the chain: the next snapshot is of everything. Buffers and this rank's own tensors are small
and stand in every entry as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.engines.base import Replay, StateSlice, Update
from trainer.checkpoint.slots import Header, Plan, Slot, make_plan
from trainer.checkpoint.vote import Snapshot

_FACTS = "update"
_SKIP = "update.skip"


class UpdateLog:
    """This rank's updates since its newest snapshots of everything.

    Args:
        folder: where its files are.
        length: of a chain; 0: there is no log.

    Attributes:
        slots: one more than a chain is long: ranks may have to go back over the newest whole snapshot to the end
            of the chain before it, while the first update after it is written.
        layout: of the entries that this process can use, optimizer included; empty: of none.
        base: the whole snapshot that the next update may follow, itself or by others; None: there is none.
    """

    def __init__(self, folder: Path, rank: int, length: int) -> None:
        count = length + 1 if length else 0
        self.slots = [Slot(folder / f"rank-{rank:05d}.log-{index}") for index in range(count)]
        self.length = length
        self.base: Snapshot | None = None
        self.layout = self._recipe = ""
        self._plan: Plan | None = None

    def plan(self, update: Update, rank_tensors: Mapping[str, Tensor]) -> Plan:
        """How an entry is laid out; made once, before what is there is looked at."""
        if self._plan is None:
            self._plan = make_plan(_slices(update), _own(update, rank_tensors), update.recipe)
            self.layout, self._recipe = self._plan.layout, update.recipe
        return self._plan

    def follows(self, update: Update, step: int, timeline: int) -> bool:
        """Whether the update of this step may be kept alone.

        Not where a hook has changed the optimizer's settings: who starts again replays before any hook is called.
        """
        base = self.base
        if base is None or update.recipe != self._recipe:
            return False
        return base.timeline == timeline and base.step < step <= base.step + self.length

    def chain(self, header: Header) -> list[Slot]:
        """The sealed updates that follow a whole snapshot, in order."""
        mine = (header.run, header.rank, header.world_size, self.layout, header.timeline, header.step)
        by_step = {
            h.step: slot
            for slot in self.slots
            if (h := slot.header) is not None
            and (h.run, h.rank, h.world_size, h.layout, h.timeline, h.base) == mine
        }
        found: list[Slot] = []
        while (step := header.step + 1 + len(found)) in by_step:
            found.append(by_step[step])
        return found


def sources(update: Update, rank_tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors of an entry, in the order of its plan."""
    return [*(piece.tensor for piece in _slices(update)), *_own(update, rank_tensors).values()]


def facts(update: Update) -> dict[str, Any]:
    """What an entry says beside tensors, as JSON values."""
    told = {"lr": update.lr, "decided": update.skip is not None, "missing": sorted(update.missing)}
    return {_FACTS: told}


def replay(
    slot: Slot, again: Replay, slices: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Do a verified entry's update again.

    Args:
        again: of the engine.
        slices: of this rank, by name; the buffers are filled.

    Returns:
        The entry's tensors by key, and the trainer's state after it.
    """
    tensors, state = slot.read()
    told = state.pop(_FACTS)
    gradients = {key.removeprefix("grad."): g for key, g in tensors.items() if key.startswith("grad.")}
    skip = tensors[f"rank.{_SKIP}"] if told["decided"] else None
    again(told["lr"], skip, {name: g for name, g in gradients.items() if name not in told["missing"]})
    with torch.no_grad():
        for name in tensors.keys() & slices.keys():
            slices[name].copy_(tensors[name])
    return tensors, state


def _slices(update: Update) -> list[StateSlice]:
    return [*update.gradients, *update.buffers]


def _own(update: Update, rank_tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    skip = torch.zeros(()) if update.skip is None else update.skip
    return {**rank_tensors, _SKIP: skip}
