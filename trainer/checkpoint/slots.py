"""One rank's state in a mapped file: written in place, warm, and there when the process is not.

    0      header: JSON with a checksum of its own; zeros while the slot is not sealed
    4096   tensors, each at a multiple of 64 bytes, at the same places in every snapshot
    …      table (JSON: key, dtype, shape, place of each tensor), then the trainer's state (JSON)

The header is written last and holds a checksum of everything behind it. A slot without a valid header does not
exist for anyone. Pages are reserved when the file is made, so that a full memory mount is an error there and not a
SIGBUS in the middle of a copy.

The checksum is the xxh3_128 of the CRC-32 of each 8 MiB. Processors have instructions for a CRC, so it costs the
reading, and what a CPU copies is summed piece by piece while it is in the cache: nothing is read twice.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from isal.isal_zlib import crc32
from torch import Tensor

from parallel.engines.base import StateSlice
from trainer.checkpoint.shards import DTYPE_NAMES, DTYPES
from trainer.checkpoint.vote import Snapshot

FORMAT = "muster-slot-3"
HEADER_BYTES = 4096
_ALIGN = 64
_BLOCK = 8 << 20
_PIECE = 512 << 10  # stays in a core's cache between the copy and the sum
_STATE_ROOM = 1 << 16


@dataclass(frozen=True)
class Header:
    """What a sealed slot holds.

    Attributes:
        run: of which run (:class:`trainer.checkpoint.timeline.Timelines`).
        rank, world_size: whose state it is.
        layout: fingerprint of the tensors and their places in the model.
        generation: launch that wrote it.
        checksum: of the tensors, the table and the state (:class:`Sums`).
        base: of an update (trainer/checkpoint/updates.py), the step of the whole snapshot that it follows; -1:
            this is one.
    """

    run: str
    rank: int
    world_size: int
    layout: str
    generation: int
    timeline: int
    step: int
    data_bytes: int
    table_bytes: int
    state_bytes: int
    checksum: str = ""
    base: int = -1

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.step, self.timeline)

    @property
    def size(self) -> int:
        """Bytes from the beginning of the file that it speaks of."""
        return HEADER_BYTES + self.data_bytes + self.table_bytes + self.state_bytes

    def render(self) -> bytes:
        """The header as it is stored."""
        text = json.dumps({"format": FORMAT, **asdict(self)}).encode()
        return text + b"\n" + xxhash.xxh3_64_hexdigest(text).encode() + b"\n"

    @classmethod
    def parse(cls, raw: bytes) -> Header | None:
        """What was stored; None if it is not a whole header."""
        text, _, rest = raw.partition(b"\n")
        if not text or rest[:17] != xxhash.xxh3_64_hexdigest(text).encode() + b"\n":
            return None
        body = json.loads(
            text
        )  # its checksum agrees: it is what this program wrote, maybe another version of it
        return cls(**body) if body.pop("format", None) == FORMAT else None


@dataclass(frozen=True)
class Plan:
    """Where each tensor of a rank's state stands in a slot.

    Attributes:
        entries: key → (dtype, shape, offset in the tensors' part).
        table: the same as it is stored.
        layout: fingerprint of it and of each slice's place in the whole tensor.
    """

    entries: Mapping[str, tuple[str, tuple[int, ...], int]]
    data_bytes: int
    table: bytes
    layout: str

    @property
    def room(self) -> int:
        """Bytes of a slot."""
        return HEADER_BYTES + self.data_bytes + len(self.table) + _STATE_ROOM


def keys_of(slices: Iterable[StateSlice], rank_tensors: Iterable[str]) -> list[str]:
    """A key for each tensor, the slices' first: an engine may name several boxes of one tensor."""
    counts: dict[str, int] = {}
    keys = []
    for piece in slices:
        count = counts[piece.name] = counts.get(piece.name, -1) + 1
        keys.append(f"{piece.name}#{count}" if count else piece.name)
    return keys + [f"rank.{name}" for name in rank_tensors]


def make_plan(slices: Sequence[StateSlice], rank_tensors: Mapping[str, Tensor], layout: str) -> Plan:
    """Lay out what a rank holds: replicas too, so that it needs nobody to go on from its own slot.

    Args:
        layout: what else must be the same for a snapshot to fit (degrees, engine).
    """
    tensors = [*(piece.tensor for piece in slices), *rank_tensors.values()]
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    position = 0
    for key, tensor in zip(keys_of(slices, rank_tensors), tensors, strict=True):
        entries[key] = (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), position)
        position += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
    table = json.dumps(entries, separators=(",", ":")).encode()
    places = [(piece.name, piece.global_shape, piece.offsets) for piece in slices]
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps([layout, places]).encode() + table)
    return Plan(entries, position, table, fingerprint)


class Sums:
    """The checksum of a slot, while its bytes come.

    Attributes:
        size: bytes seen.
    """

    def __init__(self) -> None:
        self.size = 0
        self._done: list[int] = []
        self._open = 0

    def update(self, data: memoryview) -> None:
        """These bytes come next. Lets go of the GIL."""
        while data:
            part = data[: _BLOCK - self.size % _BLOCK]
            self._open = crc32(part, self._open)
            self.size += len(part)
            data = data[len(part) :]
            if self.size % _BLOCK == 0:
                self._done.append(self._open)
                self._open = 0

    def hexdigest(self) -> str:
        """xxh3_128 of the sums of all blocks and of the size, 32 hex digits."""
        return xxhash.xxh3_128_hexdigest(np.array([*self._done, self._open, self.size], "<u8").tobytes())


class Slot:
    """One file. Not thread-safe: its owner says who writes.

    Args:
        path: made if missing; of its own directory, which nobody else writes to.

    Attributes:
        header: of what is sealed in it; None: nothing.
        busy: readers that it must not be overwritten under.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.busy = 0
        self._views: dict[str, Tensor] = {}
        self._map_file()
        self.header = Header.parse(bytes(self._map[:HEADER_BYTES])) if self.size >= HEADER_BYTES else None
        if self.header is not None and self.header.size > self.size:
            self.header = None

    def _map_file(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.size = os.fstat(descriptor).st_size
            self._map = mmap.mmap(descriptor, self.size) if self.size else mmap.mmap(-1, 1)
        finally:
            os.close(descriptor)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self._views = {}

    def reserve(self, size: int) -> None:
        """Make it at least ``size`` bytes, all of them backed. Raises OSError where there is no room."""
        if size <= self.size:
            return
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)
        self._map_file()

    def view(self, dtype: str, shape: tuple[int, ...], offset: int) -> Tensor:
        """A tensor that is this part of the file."""
        kind = DTYPES[dtype]
        count = torch.Size(shape).numel()
        start = HEADER_BYTES + offset
        return self.bytes[start : start + count * kind.itemsize].view(kind).view(shape)

    def views(self, plan: Plan) -> list[Tensor]:
        """All tensors of a plan, in its order; kept, since making them takes longer than filling small ones."""
        if not self._views:
            self._views = {key: self.view(*entry) for key, entry in plan.entries.items()}
        return list(self._views.values())

    def unseal(self) -> None:
        """From here on nothing is in it."""
        self.header = None
        self._map[:HEADER_BYTES] = bytes(HEADER_BYTES)

    def write_texts(self, header: Header, table: bytes, state: bytes) -> None:
        """Put the table and the state behind the tensors. Raises OSError where the state has outgrown the mount."""
        if header.size > self.size:
            self.reserve(header.size + _STATE_ROOM)
        start = HEADER_BYTES + header.data_bytes
        self._map[start : start + len(table) + len(state)] = table + state

    def seal(self, header: Header) -> None:
        """It now holds what the header says, whose checksum is that of :meth:`checksum`."""
        raw = header.render()
        assert len(raw) <= HEADER_BYTES
        self._map[: len(raw)] = raw
        self.header = header

    def fill(self, plan: Plan, sources: list[Tensor]) -> Sums:
        """Copy the tensors in, in the order of the plan.

        Returns:
            The checksum so far: of all of the tensors where they are on the CPU; of nothing where a device still
            writes them (synchronise before :meth:`checksum`).
        """
        targets, sums = self.views(plan), Sums()
        if any(source.is_cuda for source in sources):
            # One call: for hundreds of small tensors Python costs more than the copies.
            torch._foreach_copy_(targets, sources, non_blocking=True)
            return sums
        whole = self.bytes.numpy()[HEADER_BYTES:]
        for target, source, (_, _, offset) in zip(targets, sources, plan.entries.values(), strict=True):
            if not source.is_contiguous():
                target.copy_(source)
                continue
            data = source.detach().view(-1).view(torch.uint8).numpy()
            for start in range(0, data.size, _PIECE):
                piece = data[start : start + _PIECE]
                end = offset + start + piece.size
                np.copyto(whole[end - piece.size : end], piece)
                if end - sums.size >= _PIECE:
                    sums.update(whole.data[sums.size : end])
        sums.update(whole.data[sums.size : plan.data_bytes])
        return sums

    def checksum(self, header: Header, sums: Sums | None = None) -> str:
        """Of what the header speaks of, hex.

        Args:
            sums: of the beginning of it, from :meth:`fill`.
        """
        sums = Sums() if sums is None else sums
        sums.update(self.bytes.numpy().data[HEADER_BYTES + sums.size : header.size])
        return sums.hexdigest()

    def fault(self) -> str | None:
        """Why what is sealed in it is not what was written; None if it is."""
        if self.header is None:
            return "is not sealed"
        if self.checksum(self.header) != self.header.checksum:
            return "has changed: its checksum does not agree with its header"
        return None

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by key (parts of the file, not copies) and the trainer's state."""
        header = self.header
        assert header is not None
        start = HEADER_BYTES + header.data_bytes
        table = json.loads(self._map[start : start + header.table_bytes])
        state = json.loads(self._map[start + header.table_bytes : header.size])
        return {key: self.view(kind, tuple(shape), at) for key, (kind, shape, at) in table.items()}, state

    def remove(self) -> None:
        """Give the memory back (when the last mapping goes)."""
        self.path.unlink(missing_ok=True)
