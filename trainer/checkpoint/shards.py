"""The tensor files of a checkpoint: streamed out with a running checksum, re-read against it.

The container is safetensors (an 8-byte header length, a JSON header, the raw bytes). It is written here
rather than by the library so that a shard needs no second copy in memory and its checksum is taken of
the bytes that were meant, before any disk or cache has had them.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The safetensors names of the types a checkpoint holds."""

DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_BLOCK = 8 << 20


def write_shard(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> tuple[int, str]:
    """Write contiguous host tensors under unique keys, flushed to the disk.

    Returns:
        The file's size in bytes and its xxh3_128 as 32 hex digits.
    """
    # Widest type first: then every tensor is aligned to its element without padding in between.
    ordered = sorted(tensors, key=lambda item: -item[1].element_size())
    header, position = {}, 0
    for key, tensor in ordered:
        end = position + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksum = xxhash.xxh3_128()
    size = 0
    with path.open("wb") as file:
        for block in (len(text).to_bytes(8, "little"), text):
            checksum.update(block)
            size += file.write(block)
        for _, tensor in ordered:
            view = tensor.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(view), _BLOCK):
                checksum.update(view[start : start + _BLOCK])
                size += file.write(view[start : start + _BLOCK])
        file.flush()
        os.fsync(file.fileno())
    return size, checksum.hexdigest()


def file_fault(path: Path, size: int, checksum: str, from_disk: bool = False) -> str | None:
    """Why the file is not the one that was written; None if it is, byte for byte.

    Args:
        path: the file.
        size: its size in bytes.
        checksum: its xxh3_128.
        from_disk: past the page cache, so that what is checked is what the disk kept.
    """
    try:
        found = path.stat().st_size
        if found != size:
            return f"has {found:,} bytes, not {size:,}"
        running, buffer = xxhash.xxh3_128(), memoryview(mmap.mmap(-1, _BLOCK))
        with os.fdopen(_opened(path, from_disk), "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                running.update(buffer[:count])
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if running.hexdigest() != checksum:
        return "has changed: its checksum does not agree with the manifest"
    return None


def _opened(path: Path, from_disk: bool) -> int:
    """A descriptor to read from: past the page cache where the file system can, which is also less work."""
    if from_disk and hasattr(os, "O_DIRECT"):
        with suppress(OSError):  # a file system without it says so here; what else is wrong comes again below
            return os.open(path, os.O_RDONLY | os.O_DIRECT)
    descriptor = os.open(path, os.O_RDONLY)
    if from_disk and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return descriptor
