"""The memory tier: every few steps a rank's whole state is copied into a mapped file that outlives the process.

    training thread   copy into the oldest slot ─┐ returns
    sealing thread                               └ checksum → header → the peer tier (trainer/checkpoint/peer.py)

On a CPU the checksum is made of what is copied as it is copied, which is less work than to read it again.

No collective is issued. A snapshot counts once its header is sealed; which one all ranks have is found at the next
start (trainer/checkpoint/vote.py). With three slots there is always a common one: while a rank overwrites its
oldest, the others are at most one snapshot behind, and everyone has sealed the one before that.

With a snapshot after every step, most are no copy of the state but of what the step was given
(trainer/checkpoint/updates.py).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from parallel.engines.base import Replay, StateSlice, Update
from parallel.errors import ConfigError
from trainer import faults
from trainer.checkpoint import updates
from trainer.checkpoint.lease import Lease
from trainer.checkpoint.pages import register
from trainer.checkpoint.slots import Header, Plan, Slot, Sums, keys_of, make_plan
from trainer.checkpoint.timeline import Timelines
from trainer.checkpoint.updates import UpdateLog
from trainer.checkpoint.vote import Snapshot


class MemoryTier:
    """This rank's snapshots.

    Args:
        lease: of the run's folder.
        rank, world_size: of this process.
        generation: of this launch.
        layout: what must be the same for a snapshot to fit: degrees and engine.
        num_slots: at least 3.
        num_updates: snapshots between two of everything that hold only what their step was given.

    Attributes:
        stall_seconds: what the newest snapshot cost training.
    """

    def __init__(
        self,
        lease: Lease,
        rank: int,
        world_size: int,
        generation: int,
        layout: str,
        num_slots: int,
        num_updates: int = 0,
    ) -> None:
        self.lease = lease
        self.rank, self.world_size, self.generation = rank, world_size, generation
        self._layout = layout
        self.slots = [Slot(lease.folder / f"rank-{rank:05d}.slot-{index}") for index in range(num_slots)]
        self.log = UpdateLog(lease.folder, rank, num_updates)
        self._sent: list[int] = []
        self.stall_seconds = 0.0
        self._plan: Plan | None = None
        self._rooms: list[tuple[Slot, int]] = []
        self._run = ""
        self._sealer = ThreadPoolExecutor(1, "muster-seal")
        self._sealing: Future[None] | None = None

    def plan(self, slices: Sequence[StateSlice], rank_tensors: Mapping[str, Tensor]) -> Plan:
        """How this rank's state is laid out; made once."""
        if self._plan is None:
            self._plan = make_plan(slices, rank_tensors, self._layout)
        return self._plan

    def claim(
        self,
        host: str,
        slices: Sequence[StateSlice],
        rank_tensors: Mapping[str, Tensor],
        update: Update | None = None,
    ) -> Claim:
        """What this rank is about to reserve, for :func:`check_claims`.

        Args:
            update: one of the form that :meth:`snapshot` will be given; None: there will be none.
        """
        self._rooms = [(slot, self.plan(slices, rank_tensors).room) for slot in self.slots]
        if update is not None:
            self._rooms += [(slot, self.log.plan(update, rank_tensors).room) for slot in self.log.slots]
        folder = self.lease.folder
        missing = sum(max(0, room - slot.size) for slot, room in self._rooms)
        free = min(shutil.disk_usage(folder).free, psutil.virtual_memory().available)
        return Claim(host, str(folder.parent.parent), missing, free)

    def prepare(self, device: torch.device) -> None:
        """Reserve every page of every slot. What is sealed stays.

        Raises:
            ConfigError: there is no room for it.
        """
        assert self._rooms, "claim() comes first"
        room = 0
        try:
            for slot, room in self._rooms:
                slot.reserve(room)
                if device.type == "cuda":
                    register(slot.bytes)
        except OSError as error:
            relation = f"a snapshot of {room:,} bytes cannot be reserved there: {error.strerror}"
            raise _no_room(str(self.lease.folder.parent.parent), relation) from error

    def snapshot(
        self,
        step: int,
        slices: Iterable[StateSlice],
        rank_tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        timelines: Timelines,
        on_sealed: Callable[[Slot], None] | None = None,
        update: Update | None = None,
    ) -> None:
        """Copy the state into a slot; returns as soon as it may change again.

        Args:
            step: optimizer steps done.
            slices: everything that this rank holds, owned or not.
            rank_tensors: its own tensors (RNG state).
            state: the trainer's, as JSON values.
            timelines: of the run; the newest is the snapshot's.
            on_sealed: told the slot when it is sealed, by the sealing thread; it is not overwritten while ``busy``
                is above 0. The newest two snapshots that have one stay longest: peers have no others.
            update: what the step was given, if nothing else changed the state since the snapshot before; may be
                copied instead, but never where there is an ``on_sealed``.

        Raises:
            OSError: sealing the one before failed.
        """
        began = time.perf_counter()
        self.wait()
        assert self._plan is not None, "claim() comes first"
        self._run, base = timelines.run, self.log.base
        if update is not None and on_sealed is None and self.log.follows(update, step, timelines.current):
            assert base is not None
            plan, sources = self.log.plan(update, rank_tensors), updates.sources(update, rank_tensors)
            state = {**state, **updates.facts(update)}
            slot = self._next_slot(self.log.slots, timelines)
        else:
            plan, base = self._plan, None
            sources = [*(piece.tensor for piece in slices), *rank_tensors.values()]
            slot = self._next_slot(self.slots, timelines)
            self.log.base = Snapshot(step, timelines.current)
        slot.unseal()
        if on_sealed is not None:
            self._sent = [*self._sent[-1:], step]
        sums = slot.fill(plan, sources)
        text = json.dumps(state, separators=(",", ":")).encode()
        header = Header(
            timelines.run, self.rank, self.world_size, plan.layout, self.generation, timelines.current, step,
            plan.data_bytes, len(plan.table), len(text), base=-1 if base is None else base.step,
        )  # fmt: skip
        if any(source.is_cuda for source in sources):
            torch.cuda.current_stream().synchronize()
        self._sealing = self._sealer.submit(self._seal, slot, header, sums, plan.table, text, on_sealed)
        self.stall_seconds = time.perf_counter() - began

    def start_anew(self) -> None:
        """The state was changed by more than updates: the next snapshot is of everything."""
        self.log.base = None

    def _next_slot(self, slots: Sequence[Slot], timelines: Timelines) -> Slot:
        """What is of no use, else the oldest."""

        def worth(slot: Slot) -> tuple[bool, bool, int]:
            header = slot.header
            if header is None or header.run != timelines.run:
                return False, False, -1
            return timelines.counts(header.step, header.timeline), header.step in self._sent, header.step

        while True:
            free = [slot for slot in slots if not slot.busy]
            if free:
                return min(free, key=worth)
            time.sleep(0.001)  # every slot is being sent: only with slots fewer than senders

    def _seal(
        self,
        slot: Slot,
        header: Header,
        sums: Sums,
        table: bytes,
        text: bytes,
        on_sealed: Callable[[Slot], None] | None,
    ) -> None:
        faults.reach("snapshot", header.step)
        slot.write_texts(header, table, text)
        slot.seal(replace(header, checksum=slot.checksum(header, sums)))
        self.lease.touch()
        if on_sealed is not None:
            on_sealed(slot)

    def wait(self) -> None:
        """Until the newest snapshot is sealed. Raises OSError if it could not be."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def sealed(self, step: int) -> bool:
        """Whether a snapshot of the step is sealed."""
        return any(
            slot.header is not None and slot.header.step == step for slot in (*self.slots, *self.log.slots)
        )

    def offers(self, run: str, layout: str) -> tuple[Snapshot, ...]:
        """Sealed snapshots of this run and layout, with all that they build upon. Call :meth:`wait` before."""
        self._run = run
        mine = (run, self.rank, self.world_size, layout)
        found: list[Snapshot] = []
        for slot in self.slots:
            if (h := slot.header) is not None and (h.run, h.rank, h.world_size, h.layout) == mine:
                found += [
                    h.snapshot,
                    *(Snapshot(h.step + n, h.timeline) for n, _ in enumerate(self.log.chain(h), 1)),
                ]
        return tuple(dict.fromkeys(found))

    def parts(self, snapshot: Snapshot) -> list[Slot]:
        """The slots that hold it: one of everything, and the updates since. Empty if it is not there."""
        for slot in self.slots:
            h = slot.header
            if h is None or h.run != self._run or h.timeline != snapshot.timeline:
                continue
            after = snapshot.step - h.step
            if after == 0 or (after > 0 and len(self.log.chain(h)) >= after):
                return [slot, *self.log.chain(h)[:after]]
        return []

    def fault(self, snapshot: Snapshot) -> str | None:
        """Verify a snapshot; what is damaged of it is struck off. Returns what is wrong with it."""
        for slot in self.parts(snapshot):
            found = slot.fault()
            if found is not None:
                slot.unseal()
                return f"{slot.path} {found}"
        return None

    def load(
        self,
        snapshot: Snapshot,
        slices: Sequence[StateSlice],
        rank_tensors: Sequence[str],
        again: Replay | None = None,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fill the slices from a verified snapshot.

        Args:
            again: does an update again; needed where snapshots were given updates.

        Returns:
            The trainer's state, and this rank's own tensors.
        """
        whole, *log = self.parts(snapshot)
        tensors, state = whole.read()
        keys = keys_of(slices, rank_tensors)
        with torch.no_grad():
            for piece, key in zip(slices, keys, strict=False):
                piece.tensor.copy_(tensors[key])
        buffers = {piece.name: piece.tensor for piece in slices}
        for slot in log:
            assert again is not None
            tensors, state = updates.replay(slot, again, buffers)
        return state, {name: tensors[f"rank.{name}"].clone() for name in rank_tensors}

    def remove(self) -> None:
        """Give the memory back: what is in it is safe elsewhere, or not wanted."""
        self._sealer.shutdown(wait=True)
        for slot in (*self.slots, *self.log.slots):
            slot.remove()
        self.lease.release()


@dataclass(frozen=True)
class Claim:
    """Memory that a rank of ``host`` needs under ``mount``, and what it sees free there."""

    host: str
    mount: str
    missing: int
    free: int


def check_claims(claims: Sequence[Claim]) -> ConfigError | None:
    """Whether all ranks' slots fit together, before anyone reserves; the same answer from the same claims."""
    for host in sorted({claim.host for claim in claims}):
        here = [claim for claim in claims if claim.host == host]
        missing, free = sum(claim.missing for claim in here), min(claim.free for claim in here)
        if missing > free:
            relation = (
                f"the snapshots of {len(here)} rank(s) on {host} need {missing:,} bytes, {free:,} are free"
            )
            return _no_room(here[0].mount, relation)
    return None


def _no_room(mount: str, relation: str) -> ConfigError:
    return ConfigError(
        "checkpoint.memory_dir",
        mount,
        relation,
        "a larger mount (docker run --shm-size), checkpoint.memory_dir=FOLDER of one, or checkpoint.memory_every=0",
    )


def rank_tensors_of(device: torch.device) -> dict[str, Tensor]:
    """What only this rank has: the states of its random number generators."""
    found = {"torch_rng": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda_rng"] = torch.cuda.get_rng_state()
    return found


def set_rank_tensors(found: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on with the random numbers of a saved state."""
    torch.set_rng_state(found["torch_rng"])
    if device.type == "cuda" and "cuda_rng" in found:
        torch.cuda.set_rng_state(found["cuda_rng"])
