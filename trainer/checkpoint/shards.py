"""The tensor files of a checkpoint: laid out in memory, written with a running checksum, re-read against it.

The container is safetensors (an 8-byte header length, a JSON header, the raw bytes). It is written here
rather than by the library so that a shard needs no second copy in memory and its checksum is taken of
the bytes that were meant, before any disk or cache has had them.

Training's own copy is the file: tensors are copied to where they stand in it, and the disk takes it from there past
the page cache (O_DIRECT, where the file system has it). A write through the cache costs a processor three times as
much, and the removal of what is in it twenty times; nobody would read what it keeps.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from trainer.checkpoint.pages import PAGE, empty_pages

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
_ALIGN = 64  # of the first tensor, as processors like it


@dataclass(frozen=True)
class ShardImage:
    """A shard file in host memory.

    Attributes:
        memory: uint8, from the beginning of a page; its first ``size`` bytes are the file.
        size: of the file, in bytes.
        tensors: by key, parts of ``memory``.
    """

    memory: Tensor
    size: int
    tensors: dict[str, Tensor]


def lay_out(tensors: Sequence[tuple[str, Tensor]], allocate: Callable[[int], Tensor]) -> ShardImage:
    """The image of a file with tensors like these under unique keys; all but their values is there.

    Args:
        tensors: of any device; only their types and shapes count.
        allocate: given a size in bytes, uint8 memory of at least that, from the beginning of a page.
    """
    # Widest type first: then every tensor is aligned to its element without padding in between.
    ordered = sorted(tensors, key=lambda item: -item[1].element_size())
    header, places, position = {}, [], 0
    for key, tensor in ordered:
        end = position + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        places.append((position, end))
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    start, size = 8 + len(text), 8 + len(text) + position
    memory = allocate(size)
    memory[:start] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
    views = {
        key: memory[start + begin : start + end].view(tensor.dtype).view(tensor.shape)
        for (key, tensor), (begin, end) in zip(ordered, places, strict=True)
    }
    return ShardImage(memory, size, views)


def write_shard(path: Path, image: ShardImage) -> str:
    """Write the file, flushed to the disk.

    Returns:
        Its xxh3_128 as 32 hex digits.

    Raises:
        OSError: the disk is full, refuses or fails.
    """
    checksum, data = xxhash.xxh3_128(), image.memory.numpy().data[: image.size]
    descriptor = _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, past_cache=True)
    try:
        for start in range(0, image.size, _BLOCK):
            block = data[start : start + _BLOCK]
            checksum.update(block)
            while block:
                whole = len(block) - len(block) % PAGE
                if not whole:  # what is left is less than a page
                    _through_cache(descriptor)
                try:
                    block = block[os.write(descriptor, block[: whole or None]) :]
                except OSError as error:
                    # EINVAL: a disk with larger blocks, or the rest of a block that was cut short.
                    if error.errno != errno.EINVAL or not _through_cache(descriptor):
                        raise
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return checksum.hexdigest()


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
        running, buffer = xxhash.xxh3_128(), empty_pages(_BLOCK).numpy().data
        with os.fdopen(_opened(path, os.O_RDONLY, from_disk), "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                running.update(buffer[:count])
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if running.hexdigest() != checksum:
        return "has changed: its checksum does not agree with the manifest"
    return None


def _opened(path: Path, flags: int, past_cache: bool) -> int:
    """A descriptor: past the page cache where the file system can, which is also less work."""
    if past_cache and hasattr(os, "O_DIRECT"):
        with suppress(OSError):  # a file system without it says so here; what else is wrong comes again below
            return os.open(path, flags | os.O_DIRECT, 0o666)
    descriptor = os.open(path, flags, 0o666)
    if past_cache and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return descriptor


def _through_cache(descriptor: int) -> bool:
    """Write through the page cache from here on; False if that was so before."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    direct = getattr(os, "O_DIRECT", 0)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)
