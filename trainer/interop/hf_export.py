"""A Muster checkpoint as a folder that transformers and vLLM load."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from parallel.engines.base import StateSlice
from parallel.errors import ConfigError
from trainer.build import run_of
from trainer.checkpoint.files import check_room
from trainer.checkpoint.resume import Checkpoint, open_checkpoint
from trainer.checkpoint.shards import DTYPES
from trainer.compose import load_frozen
from trainer.config import Dtype, RunConfig
from trainer.interop import verify as verification
from trainer.interop.families import family_for, make_pieces, read_fields
from trainer.interop.family import Family
from trainer.interop.hf import KEPT, RECORD, Converted, model_state, row_of, under_hidden_name
from trainer.interop.hf_config import HfConfig
from trainer.interop.plan import Piece, Shape
from trainer.interop.record import Conversion, Row, dtypes_of
from trainer.interop.tensors import Planned, checksum, raw_bytes, write_files
from trainer.interop.tokenizer_files import write_tokenizer


def export_model(
    source: Path, target: Path, *, dtype: str, shard_bytes: int, verify: bool, tolerance: float
) -> Converted:
    """Write a checkpoint's model as a folder that transformers and vLLM load.

    Args:
        source: a run directory (its newest valid checkpoint is taken) or a checkpoint.
        target: the folder; must not exist, or be empty.
        dtype: fp32, bf16 or fp16; auto: as the imported model had it, else the run's ``train.dtype``.
        shard_bytes: most bytes of one file.

    Raises:
        ConfigError: no family can express the model; something cannot be read or written; the logits differ.
    """
    checkpoint = open_checkpoint(source)
    run_dir = run_of(checkpoint)
    config = load_frozen(run_dir / "config.yaml")
    family = family_for(config)
    values = family.write(config)
    origin = _origin(run_dir, config, family)
    if origin is not None:
        kept = HfConfig.load(origin)
        if read_fields(family, kept) == read_fields(family, HfConfig(origin, dict(values))):
            values = {**kept.values, **family.always}
    state = model_state(config)
    _check_same_model(checkpoint, state)
    pieces = make_pieces(family, config, values, {name: piece.global_shape for name, piece in state.items()})
    planned = {piece.hf.name: piece for piece in pieces}
    dtypes = _dtypes(planned, dtype, config, family, origin)
    num_parameters = sum(math.prod(piece.shape) for piece in pieces)
    if verify:
        verification.check_possible(num_parameters)
    rows: list[Row] = []

    def produce(tensor: Planned) -> Tensor:
        piece = planned[tensor.name]
        box = checkpoint.read(f"model.{piece.muster}", piece.offsets, piece.shape)
        stored = _narrowed(piece.change.to_hf(box), tensor)
        rows.append(row_of(piece, piece.hf.name, None, stored, checksum(raw_bytes(stored)), box.dtype))
        return stored

    with under_hidden_name(target, "HF_DIR") as folder:
        tensors = [Planned(name, dtypes[name], piece.hf_shape) for name, piece in planned.items()]
        check_room(folder, sum(tensor.bytes for tensor in tensors))
        write_files(folder, tensors, shard_bytes, produce)
        values |= write_tokenizer(run_dir, origin, folder)
        values.pop("dtype", None)
        values["torch_dtype"] = _main_dtype(tensors)
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        compared = None
        if verify:
            compared = verification.compare(folder, config, checkpoint, dtypes, pieces, tolerance)
        Conversion(
            direction="export",
            family=family.model_type,
            source=str(checkpoint.path.absolute()),
            output=str(target.absolute()),
            rows=rows,
            left_out=[],
            copies={},
            fresh=[],
            weights_digest=checkpoint.weights_digest,
            verification=compared,
        ).write(folder / RECORD)
    return Converted(target, family.model_type, len(rows), num_parameters, compared)


def _check_same_model(checkpoint: Checkpoint, state: dict[str, StateSlice]) -> None:
    held = {
        name.removeprefix("model."): e.global_shape
        for name, e in checkpoint.tensors.items()
        if name.startswith("model.")
    }
    wanted: dict[str, Shape] = {name: piece.global_shape for name, piece in state.items()}
    for name in sorted(held.keys() ^ wanted.keys()):
        which = "no" if name in wanted else "a"
        raise ConfigError(
            "checkpoint",
            checkpoint.path,
            f"holds {which} tensor {name}, unlike the model of its config.yaml",
            "give the run directory that it belongs to",
        )
    for name, shape in wanted.items():
        if held[name] != shape:
            raise ConfigError(
                "checkpoint",
                checkpoint.path,
                f"holds {name} as {list(held[name])}, its config.yaml says {list(shape)}",
                "give the run directory that it belongs to",
            )


def _origin(run_dir: Path, config: RunConfig, family: Family) -> Path | None:
    """Files of the imported model that a run goes back to, through the runs in between."""
    seen: set[Path] = set()
    while run_dir not in seen:
        seen.add(run_dir)
        kept = run_dir / KEPT
        if (kept / "config.json").is_file():
            same = HfConfig.load(kept).values.get("model_type") == family.model_type
            return kept if same else None
        if config.checkpoint.load_from is None:
            return None
        path = Path(config.checkpoint.load_from)
        run_dir = next((p for p in (path, *path.parents[:2]) if (p / "config.yaml").is_file()), run_dir)
        if run_dir not in seen:
            config = load_frozen(run_dir / "config.yaml")
    return None


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _dtypes(
    planned: dict[str, Piece], asked: str, config: RunConfig, family: Family, origin: Path | None
) -> dict[str, torch.dtype]:
    """The type that each tensor is written in."""
    kept = dtypes_of(origin / RECORD) if origin is not None and asked == "auto" else {}
    default = _DTYPES["bf16" if config.train.dtype is Dtype.bf16 else "fp32"]
    found = {}
    for name in planned:
        leaf = name.split(".", 3)[-1]
        if name in kept:
            found[name] = DTYPES[kept[name]]
        elif leaf in family.fp32:
            found[name] = torch.float32
        else:
            found[name] = default if asked == "auto" else _DTYPES[asked]
    return found


def _narrowed(values: Tensor, tensor: Planned) -> Tensor:
    stored = values.to(tensor.dtype)
    if tensor.dtype is torch.float16 and bool((stored.isinf() & values.isfinite()).any()):
        raise ConfigError("dtype", "fp16", f"{tensor.name} has values beyond its range", "dtype=bf16")
    return stored


def _main_dtype(tensors: list[Planned]) -> str:
    size = {dtype: sum(t.bytes for t in tensors if t.dtype is dtype) for dtype in _DTYPES.values()}
    return str(max(size, key=lambda dtype: size[dtype])).removeprefix("torch.")
