"""A Hugging Face model as the first checkpoint of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from parallel.engines.base import StateSlice
from trainer.checkpoint.commit import (
    Attempt,
    assemble,
    publish,
    read_back,
    read_part,
    take_back,
    write_part,
)
from trainer.checkpoint.files import StorageError, check_room
from trainer.checkpoint.resume import open_checkpoint
from trainer.checkpoint.shards import DTYPES
from trainer.checkpoint.staging import HostMemory, stage
from trainer.checkpoint.whole import Contents
from trainer.interop import verify as verification
from trainer.interop.families import make_pieces
from trainer.interop.family import Family
from trainer.interop.hf import KEPT, RECORD, Converted, model_state, row_of, under_hidden_name
from trainer.interop.hf_config import Fields, HfConfig
from trainer.interop.matching import Match, Matched, match
from trainer.interop.new_run import new_run, write_group
from trainer.interop.record import Conversion, Row
from trainer.interop.tensors import TensorFiles
from trainer.interop.tokenizer_files import import_tokenizer, keep_side_files
from trainer.rundir import RunDirectory

_PART_BYTES = 512 << 20
"""Of fp32 values that are held in memory and written as one shard."""


def import_model(
    source: Path,
    target: Path,
    hf: HfConfig,
    family: Family,
    fields: Fields,
    overrides: list[str],
    *,
    drop: list[str],
    verify: bool,
    tolerance: float,
) -> Converted:
    """Make a run directory at step 0 of a Hugging Face model.

    Args:
        source: the model's folder.
        target: the run directory; must not exist, or be empty.
        hf, family, fields: of the model.
        overrides: of data, optim, train, parallel, …, for training it.
        drop: patterns (``model.layers.61.*``) of tensors to leave behind.
        verify: compare logits with transformers.

    Raises:
        ConfigError: a tensor is missing, unknown or of another shape; something cannot be read or written;
            the logits differ.
    """
    asked, config = new_run(family, fields, overrides, target)
    tokenizer = import_tokenizer(source, config)
    for each in (asked, config):
        each.data.tokenizer.path = str(target.absolute() / "tokenizer.json")
    state = model_state(config)
    pieces = make_pieces(
        family, config, hf.values, {name: piece.global_shape for name, piece in state.items()}
    )
    files = TensorFiles(source)
    found = match(pieces, files, drop, tied=config.model.tied_embeddings)
    fresh = sorted(state.keys() - {piece.muster for piece in pieces})
    num_parameters = sum(math.prod(piece.shape) for piece in pieces)
    if verify:
        verification.check_possible(num_parameters)
    with under_hidden_name(target, "OUT") as folder:
        check_room(folder, 4 * num_parameters)
        keep_side_files(source, folder / KEPT)
        tokenizer.save(folder / "tokenizer.json")
        RunDirectory(folder).freeze(config, asked)
        write_group(fields, family, target.absolute() / "tokenizer.json", target.absolute(), folder)
        rows = _write_checkpoint(folder / "checkpoints", files, found, state, fresh, family)
        checkpoint = open_checkpoint(folder)
        stored = {row.hf: DTYPES[row.hf_dtype] for row in rows}
        compared = None
        if verify:
            # The published names of fused entries are not on disk; their dtype is that of the fused one.
            by_piece = {m.piece.hf.name: stored[m.place.name] for m in found.matches}
            compared = verification.compare(source, config, checkpoint, by_piece, pieces, tolerance)
        Conversion(
            direction="import",
            family=family.model_type,
            source=str(source.absolute()),
            output=str(target.absolute()),
            rows=rows,
            left_out=found.left_out,
            copies=found.copies,
            fresh=fresh,
            weights_digest=checkpoint.weights_digest,
            verification=compared,
        ).write(folder / KEPT / RECORD)
    return Converted(target, family.model_type, len(rows), num_parameters, compared)


def _write_checkpoint(
    directory: Path,
    files: TensorFiles,
    found: Match,
    state: dict[str, StateSlice],
    fresh: list[str],
    family: Family,
) -> list[Row]:
    """Write step 0, part by part, as ranks would that own the pieces in turn; ``fresh`` begin at zero."""
    rows: list[Row] = []

    def read(item: Matched) -> StateSlice:
        piece, place = item.piece, item.place
        stored, digest = files.read(place, piece.hf_shape)
        dtype = state[piece.muster].tensor.dtype
        rows.append(row_of(piece, place.name, place.part, stored, digest, dtype))
        box = piece.change.to_muster(stored).to(dtype)
        return StateSlice(f"model.{piece.muster}", state[piece.muster].global_shape, piece.offsets, box, True)

    attempt = Attempt(directory, 0, "import-1")
    groups: list[list[Matched]] = []
    room = 0
    for item in found.matches:
        size = 4 * math.prod(item.piece.shape)
        if not groups or size > room:
            groups.append([])
            room = _PART_BYTES
        groups[-1].append(item)
        room -= size
    entries = []
    for rank, group in enumerate(groups):
        slices: Iterable[StateSlice] = (read(item) for item in group)
        if rank == 0:
            slices = chain(slices, (_zeros(state[name]) for name in fresh))
        entries.append(write_part(attempt, rank, stage(rank, slices, {}, HostMemory())))
    parts = [read_part(attempt.part(rank)) for rank in range(len(groups))]
    shapes = {f"model.{name}": piece.global_shape for name, piece in state.items()}
    contents = Contents(shapes, trained=frozenset())
    publish(attempt, assemble(attempt, parts, {}, {"imported": family.model_type}, contents))
    try:
        for rank, entry in enumerate(entries):
            read_back(attempt, rank, 1, entry)
    except StorageError as error:
        take_back(attempt, 1, error)
        raise
    return rows


def _zeros(piece: StateSlice) -> StateSlice:
    return replace(piece, tensor=torch.zeros(piece.global_shape, dtype=piece.tensor.dtype))
