"""Hugging Face checkpoints → Muster checkpoints and back.

    HF_DIR                              RUN_DIR
      config.json        ─ fields ─▶      config.yaml
      *.safetensors      ─ pieces ─▶      checkpoints/step-00000000/   (any layout loads it)
      tokenizer.json …   ─────────▶      tokenizer.json, huggingface/ (as they were; export gives them back)
                                          huggingface/conversion.json  (every tensor, once)

What is to be converted is known and checked before anything is written; tensors then pass through memory one
at a time. The output stands under a hidden name until it is whole and verified.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import StateSlice, whole_state
from parallel.errors import ConfigError
from trainer.build import build_model
from trainer.checkpoint.files import fsync_directory
from trainer.checkpoint.shards import DTYPE_NAMES
from trainer.config import RunConfig
from trainer.interop.plan import Piece
from trainer.interop.record import Row

KEPT = "huggingface"
"""Folder of a run directory with the small files of the model that it was imported from."""
RECORD = "conversion.json"
"""The record of a conversion: in KEPT after an import, beside the weights after an export."""


@dataclass(frozen=True)
class Converted:
    """A finished conversion: where, of which family, how large, and how the logits compared."""

    path: Path
    family: str
    num_tensors: int
    num_parameters: int
    verification: dict[str, Any] | None


def model_state(config: RunConfig) -> dict[str, StateSlice]:
    """Weights and persistent buffers of a config's model, on the meta device, without ``model.``."""
    model = build_model(config, LocalDispatcher())
    return {piece.name.removeprefix("model."): piece for piece in whole_state(model)}


@contextmanager
def under_hidden_name(target: Path, field: str) -> Iterator[Path]:
    """A new folder that gets its name at the end, and is removed if anything goes wrong before.

    Raises:
        ConfigError: the name is taken, or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(field, target, "is there already", "give a new or an empty folder")
    folder = target.absolute().with_name(f".{target.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True)
        yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)
        fsync_directory(folder.parent)
    except PermissionError as error:
        relation = f"cannot be written: {error.strerror}"
        raise ConfigError(field, target, relation, "give a folder that you may write to") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def row_of(piece: Piece, name: str, part: str | None, stored: Tensor, digest: str, dtype: torch.dtype) -> Row:
    return Row(
        hf=name,
        part=part,
        hf_dtype=DTYPE_NAMES[stored.dtype],
        hf_shape=tuple(stored.shape),
        checksum=digest,
        muster=piece.muster,
        offsets=piece.offsets,
        shape=piece.shape,
        muster_dtype=DTYPE_NAMES[dtype],
        change=piece.change.said,
    )
