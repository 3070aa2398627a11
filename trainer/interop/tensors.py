"""Safetensors files in the form of a published model, one tensor in memory at a time.

Files are read and written here rather than through a memory map, so that a model larger than memory leaves no
trace in the process: only the tensor at hand is held, and a checksum is taken of the very bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from parallel.errors import ConfigError
from trainer.checkpoint.shards import DTYPE_NAMES, DTYPES
from trainer.interop.plan import Place, Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F32", "BF16", "F16")
"""Types of weights that fp32 holds exactly."""
_LONGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class Stored:
    """An entry of a file: its type as safetensors writes it, its shape, its bytes."""

    file: Path
    dtype: str
    shape: Shape
    start: int
    end: int


class TensorFiles:
    """All tensors of a model's folder.

    Attributes:
        entries: by name.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ConfigError: there are none, a file is damaged, or index and files disagree.
        """
        self.folder = folder
        self.entries: dict[str, Stored] = {}
        index = self._index()
        for file in sorted(set(index.values())) if index else [SINGLE]:
            for name, entry in read_header(folder / file).items():
                if name in self.entries or (index and index.get(name) != file):
                    where = index.get(name) if index else self.entries[name].file.name
                    raise _broken(folder / file, f"holds {name}, which is said to be in {where}")
                self.entries[name] = entry
        for name in index:
            if name not in self.entries:
                raise _broken(folder / INDEX, f"lists {name}, which {index[name]} does not hold")

    def _index(self) -> dict[str, str]:
        """Tensor → file; empty where one file holds all."""
        path = self.folder / INDEX
        if not path.is_file():
            if (self.folder / SINGLE).is_file():
                return {}
            raise ConfigError(
                "HF_DIR",
                self.folder,
                f"holds neither {SINGLE} nor {INDEX}",
                "give a folder with safetensors; a pickle (pytorch_model.bin) is not read",
            )
        try:
            weights = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            index = {str(name): str(file) for name, file in weights.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(path, f"is no index of tensors ({type(error).__name__}: {error})") from None
        for file in index.values():
            if Path(file).name != file:
                raise _broken(path, f"names the file {file!r}, which is outside of this folder")
        return index

    def check(self, place: Place, shape: Shape) -> None:
        """Whether what is at a place has this shape and a type that fp32 holds.

        Raises:
            ConfigError: it has not.
        """
        entry, expected = self.entries[place.name], _entry_shape(self.entries[place.name], place, shape)
        if entry.shape != expected:
            raise _broken(entry.file, f"holds {place.name} as {list(entry.shape)}, not {list(expected)}")
        if entry.dtype not in FLOATS:
            raise _broken(entry.file, f"holds {place.name} as {entry.dtype}, not one of {', '.join(FLOATS)}")

    def check_all_used(self, name: str, places: set[Place]) -> None:
        """Whether these distinct places, whose shapes are right, are all of an entry.

        Raises:
            ConfigError: experts of a fused entry are left over.
        """
        experts = {place.expert for place in places}
        found = self.entries[name].shape[0]
        if None not in experts and len(experts) != found:
            raise _broken(self.entries[name].file, f"holds {found} experts in {name}, not {len(experts)}")

    def read(self, place: Place, shape: Shape) -> tuple[Tensor, str]:
        """The values at a place that was checked, and the xxh3_128 of their bytes on disk.

        Raises:
            ConfigError: its file cannot be read.
        """
        entry = self.entries[place.name]
        dtype = DTYPES[entry.dtype]
        raw = bytearray(math.prod(shape) * dtype.itemsize)
        start = entry.start
        if place.expert is not None:
            start += (place.expert * (1 if place.half is None else 2) + (place.half or 0)) * len(raw)
        try:
            with entry.file.open("rb", buffering=0) as file:
                file.seek(start)
                view, got = memoryview(raw), 0
                while got < len(raw):  # one call reads 2 GiB at most
                    part = file.readinto(view[got:])
                    if not part:
                        raise _broken(entry.file, f"ends within {place.name}")
                    got += part
        except OSError as error:
            raise _broken(entry.file, f"cannot be read: {error.strerror or error}") from None
        return torch.frombuffer(raw, dtype=dtype).view(shape), checksum(raw)


def _entry_shape(entry: Stored, place: Place, shape: Shape) -> Shape:
    """What an entry's shape must be for a place in it to have this one."""
    if place.expert is None:
        return shape
    rows = shape[0] * (1 if place.half is None else 2)
    return (*entry.shape[:1], rows, *shape[1:])


def read_header(path: Path) -> dict[str, Stored]:
    """The entries of one file, each checked to lie within it and to have the bytes of its shape.

    Raises:
        ConfigError: it is missing or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _LONGEST_HEADER):
                raise ValueError("its header does not fit into it")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(path, node, 8 + length) for name, node in header.items()}
    except OSError as error:
        raise _broken(path, f"cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, f"is not a safetensors file: {error}") from None
    for name, entry in entries.items():
        if not 8 + length <= entry.start <= entry.end <= size:
            raise _broken(path, f"has {size:,} bytes and is said to hold {name} up to byte {entry.end:,}")
    return entries


def _entry(path: Path, node: dict[str, Any], origin: int) -> Stored:
    shape = tuple(int(n) for n in node["shape"])
    start, end = (origin + int(offset) for offset in node["data_offsets"])
    dtype = str(node["dtype"])
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - start:
        raise ValueError(f"an entry of shape {list(shape)} has {end - start} bytes")
    return Stored(path, dtype, shape, start, end)


def _broken(path: Path, relation: str) -> ConfigError:
    return ConfigError("HF_DIR", path, relation, "download or save the model again")


def checksum(raw: bytes | bytearray | memoryview) -> str:
    """xxh3_128, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(raw)


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def split(tensors: Sequence[Planned], most_bytes: int) -> list[list[Planned]]:
    """Runs of tensors for one file each; a file is larger than ``most_bytes`` only for a single tensor."""
    files: list[list[Planned]] = []
    room = 0
    for tensor in tensors:
        if not files or tensor.bytes > room:
            files.append([])
            room = most_bytes
        files[-1].append(tensor)
        room -= tensor.bytes
    return files


def write_files(
    folder: Path, tensors: Sequence[Planned], most_bytes: int, produce: Callable[[Planned], Tensor]
) -> None:
    """Write a model's tensors as ``model.safetensors``, or sharded with an index.

    Args:
        produce: gives a tensor's values in its dtype when its turn comes.
    """
    files = split(tensors, most_bytes)
    index: dict[str, str] = {}
    for number, group in enumerate(files, start=1):
        name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / name, group, produce)
        index |= {tensor.name: name for tensor in group}
    if len(files) > 1:
        total = sum(tensor.bytes for tensor in tensors)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / INDEX).write_text(text + "\n")


def _write_file(path: Path, tensors: Sequence[Planned], produce: Callable[[Planned], Tensor]) -> None:
    # Widest type first: then every tensor is aligned to its element without padding in between.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        end = position + tensor.bytes
        dtype = DTYPE_NAMES[tensor.dtype]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            values = produce(tensor)
            assert (tuple(values.shape), values.dtype) == (tensor.shape, tensor.dtype), tensor.name
            file.write(raw_bytes(values))
        file.flush()
        os.fsync(file.fileno())


def raw_bytes(values: Tensor) -> memoryview:
    """The bytes of a host tensor, row by row."""
    flat = values.contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
