"""Finding the newest checkpoint that can be trusted, and loading it into any layout."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parallel.engines.base import StateSlice
from parallel.errors import ConfigError
from trainer.checkpoint.boxes import Box, intersect
from trainer.checkpoint.format import (
    MANIFEST,
    InvalidCheckpoint,
    Manifest,
    TensorEntry,
    read_manifest,
    step_directories,
)
from trainer.checkpoint.shards import DTYPE_NAMES, DTYPES, file_fault
from trainer.checkpoint.timeline import Timelines

OnSkip = Callable[[Path, str], None]
"""Told the bad file of a checkpoint that is passed over, and what is wrong with it."""


def warn_skipped(path: Path, reason: str) -> None:
    """The default for ``on_skip``: a warning in the log."""
    logging.getLogger(__name__).warning("skipping a checkpoint: %s %s", path, reason)


class Checkpoint:
    """A committed checkpoint whose manifest is sound. Shards are verified before they are first read.

    Attributes:
        path: its directory.
        step: optimizer steps done.
        trainer: the trainer's state as it was saved.
        weights_digest: 32 hex digits.
        info: what was recorded for people: layout, versions.
        world_size: ranks that wrote it.
        tensors: every tensor by name: dtype, global shape, chunks.
        timeline: on which it was saved (:mod:`trainer.checkpoint.timeline`); -1 if it does not say.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.step = manifest.step
        self.trainer: dict[str, Any] = manifest.trainer
        self.weights_digest = manifest.weights_digest
        self.info: dict[str, Any] = manifest.info
        self.world_size = manifest.world_size
        self.tensors: dict[str, TensorEntry] = manifest.tensors
        timeline = manifest.info.get("timeline")
        self.timeline = timeline if type(timeline) is int else -1
        self._manifest = manifest
        self._verified: set[str] = set()

    def verify(self) -> None:
        """Read every shard against its checksum.

        Raises:
            InvalidCheckpoint: the first file that is not what was written.
        """
        for name in self._manifest.files:
            self._verify(name)

    def _verify(self, name: str) -> None:
        if name in self._verified:
            return
        entry = self._manifest.files[name]
        if fault := file_fault(self.path / name, entry.bytes, entry.checksum):
            raise InvalidCheckpoint(self.path / name, fault)
        self._verified.add(name)

    def load_into(self, slices: Iterable[StateSlice], prefix: str = "") -> None:
        """Fill this rank's slices, owned or not, whatever layout wrote the checkpoint.

        Reads only the regions that overlap the slices, after a checksum of each file they are in.

        Args:
            slices: they name every tensor of the checkpoint whose name starts with ``prefix``, and no other.
            prefix: ``"model."`` loads weights without the optimizer.

        Raises:
            ConfigError: a tensor is missing in the checkpoint or in the slices, or has another shape or
                dtype; or a file has changed since the checkpoint was chosen. Nothing was loaded then.
        """
        wanted = list(slices)
        self._check_names({part.name for part in wanted}, prefix)
        self._read(wanted)

    def read(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The values of a box of one tensor, on the CPU; nothing else is held in memory.

        Raises:
            ConfigError: a file has changed since the checkpoint was chosen.
        """
        entry = self.tensors[name]
        box = torch.empty(shape, dtype=DTYPES[entry.dtype])
        self._read([StateSlice(name, entry.global_shape, offsets, box, owner=True)])
        return box

    def _read(self, wanted: list[StateSlice]) -> None:
        reads: dict[str, list[tuple[StateSlice, str, Box, Box]]] = defaultdict(list)
        for part in wanted:
            entry = self.tensors[part.name]
            self._check_kind(part, entry)
            if part.tensor.numel() == 0:
                continue
            for chunk in entry.chunks:
                if overlap := intersect((part.offsets, tuple(part.tensor.shape)), chunk.box):
                    reads[chunk.file].append((part, chunk.key, chunk.box, overlap))
        try:
            for file in reads:
                self._verify(file)
            for file, items in reads.items():
                self._load_file(file, items)
        except InvalidCheckpoint as error:
            raise self._unreadable(error) from error

    def _load_file(self, file: str, items: list[tuple[StateSlice, str, Box, Box]]) -> None:
        try:
            with torch.no_grad(), safe_open(self.path / file, framework="pt", device="cpu") as stored:
                for part, key, (chunk_offsets, chunk_shape), (start, shape) in items:
                    view = stored.get_slice(key)
                    self._check_stored(file, key, view, DTYPE_NAMES[part.tensor.dtype], chunk_shape)
                    if shape == chunk_shape:
                        values = stored.get_tensor(key)
                    else:
                        values = view[_region(start, shape, chunk_offsets)]
                    part.tensor[_region(start, shape, part.offsets)].copy_(values)
        except SafetensorError as error:
            raise InvalidCheckpoint(self.path / file, f"is not as its manifest says: {error}") from error

    def _check_stored(self, file: str, key: str, view: Any, dtype: str, shape: tuple[int, ...]) -> None:
        if view.get_dtype() != dtype or tuple(view.get_shape()) != shape:
            found = f"{view.get_dtype()}{view.get_shape()}"
            raise InvalidCheckpoint(
                self.path / file, f"holds {key} as {found}; its manifest says {dtype}{list(shape)}"
            )

    def rank_tensors(self, rank: int) -> dict[str, Tensor]:
        """The own tensors (RNG state) of a rank, on the CPU; none if the world that saved had no such rank.

        Raises:
            ConfigError: the file has changed since the checkpoint was chosen.
        """
        found: dict[str, Tensor] = {}
        try:
            for name, blob in self._manifest.rank_tensors.get(str(rank), {}).items():
                self._verify(blob.file)
                try:
                    with safe_open(self.path / blob.file, framework="pt", device="cpu") as stored:
                        view = stored.get_slice(blob.key)
                        self._check_stored(blob.file, blob.key, view, blob.dtype, blob.shape)
                        found[name] = stored.get_tensor(blob.key)
                except SafetensorError as error:
                    raise InvalidCheckpoint(self.path / blob.file, f"cannot be read: {error}") from error
        except InvalidCheckpoint as error:
            raise self._unreadable(error) from error
        return found

    def _check_names(self, wanted: set[str], prefix: str) -> None:
        held = {name for name in self.tensors if name.startswith(prefix)}
        for name in sorted(wanted - held)[:1]:
            raise self._mismatch(f"it holds no tensor {name}, which this run needs")
        for name in sorted(held - wanted)[:1]:
            raise self._mismatch(f"it holds a tensor {name}, which this run does not have")

    def _check_kind(self, part: StateSlice, entry: TensorEntry) -> None:
        if tuple(part.global_shape) != entry.global_shape:
            raise self._mismatch(
                f"tensor {part.name} has shape {list(entry.global_shape)} there "
                f"and {list(part.global_shape)} in this run"
            )
        if DTYPE_NAMES[part.tensor.dtype] != entry.dtype:
            here = DTYPE_NAMES[part.tensor.dtype]
            raise self._mismatch(f"tensor {part.name} is {entry.dtype} there and {here} in this run")

    def _mismatch(self, relation: str) -> ConfigError:
        return ConfigError(
            "checkpoint",
            self.path,
            relation,
            "use the model, layout and optim settings that it was saved with",
        )

    def _unreadable(self, error: InvalidCheckpoint) -> ConfigError:
        return ConfigError(
            "checkpoint", error.path, error.reason, "resume again to use the newest checkpoint that is whole"
        )


def _region(start: tuple[int, ...], shape: tuple[int, ...], origin: tuple[int, ...]) -> Any:
    """An index that selects the box from a tensor that starts at ``origin``."""
    if not shape:
        return ...
    return tuple(slice(s - o, s - o + n) for s, n, o in zip(start, shape, origin, strict=True))


def candidates(
    directory: Path,
    timelines: Timelines,
    refuse: Callable[[InvalidCheckpoint], None],
    at_most: int | None = None,
) -> Iterator[Checkpoint]:
    """Checkpoints under ``directory`` that count and have a sound manifest, newest first; shards are not read.

    Args:
        directory: ``<run>/checkpoints``; need not exist.
        timelines: of the run.
        refuse: told each one whose manifest is not sound.
        at_most: no later step than this.
    """
    for step, path in step_directories(directory):
        if at_most is not None and step > at_most:
            continue
        try:
            checkpoint = Checkpoint(path, read_manifest(path))
            if checkpoint.step != step:
                raise InvalidCheckpoint(path / MANIFEST, f"is that of step {checkpoint.step}")
        except InvalidCheckpoint as error:
            refuse(error)
            continue
        if timelines.counts(step, checkpoint.timeline):
            yield checkpoint


def none_valid(directory: Path, faults: Sequence[InvalidCheckpoint]) -> ConfigError:
    """What to say where every checkpoint has a fault."""
    found = "; ".join(f"{error.path.relative_to(directory)} {error.reason}" for error in faults)
    return ConfigError(
        "checkpoints",
        directory,
        f"none of the {len(faults)} checkpoints there is valid ({found})",
        "restore one from a backup, or start a new run; nothing was deleted",
    )


def newest_valid(directory: Path, on_skip: OnSkip = warn_skipped) -> Checkpoint | None:
    """The newest checkpoint under ``directory`` that counts and of which every byte agrees with its checksums.

    Invalid ones are passed over and left where they are. Reads all of the one that it returns, so one process
    asks and tells the others the step; they use ``open_checkpoint(path, verify=False)``.

    Args:
        directory: ``<run>/checkpoints``; need not exist. The run directory says which ones count.
        on_skip: told the first bad file of each checkpoint that is passed over, and why.

    Returns:
        None if there are no checkpoints.

    Raises:
        ConfigError: there are checkpoints and none is valid.
    """
    faults: list[InvalidCheckpoint] = []

    def refuse(error: InvalidCheckpoint) -> None:
        on_skip(error.path, error.reason)
        faults.append(error)

    for checkpoint in candidates(directory, Timelines.read(directory.parent), refuse):
        try:
            checkpoint.verify()
        except InvalidCheckpoint as error:
            refuse(error)
        else:
            return checkpoint
    if faults:
        raise none_valid(directory, faults)
    return None


def open_checkpoint(path: Path, verify: bool = True, on_skip: OnSkip = warn_skipped) -> Checkpoint:
    """Open the checkpoint that a user names.

    Args:
        path: a checkpoint (``…/step-00000100``, ``…/best``), or a run directory or its ``checkpoints``
            for the newest valid one in it.
        verify: read all shards against their checksums now, not just those that are loaded, when they are.
        on_skip: as for :func:`newest_valid`.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    if not path.is_dir():
        raise ConfigError(
            "checkpoint", path, "there is no such directory", "give a run or checkpoint directory"
        )
    if not (path / MANIFEST).exists():
        for directory in (path / "checkpoints", path):
            if step_directories(directory):
                newest = newest_valid(directory, on_skip)
                assert newest is not None
                return newest
        raise ConfigError(
            "checkpoint",
            path,
            f"holds no {MANIFEST} and no committed checkpoints",
            "give a run directory that has saved, or one of its checkpoints",
        )
    try:
        checkpoint = Checkpoint(path, read_manifest(path))
        if verify:
            checkpoint.verify()
    except InvalidCheckpoint as error:
        raise ConfigError(
            "checkpoint",
            error.path,
            error.reason,
            f"give another checkpoint, or {path.parent} for the newest valid",
        ) from error
    return checkpoint
