"""The layout of a checkpoint on disk: names, and a manifest that is checked before it is believed.

    checkpoints/step-00000100/
      manifest.json             what is where, checksums of every file, and of itself
      shard-00000.safetensors   one a rank that wrote: its slices, and its own blobs (RNG state)
    checkpoints/best            symbolic link to a step

``manifest.json`` is plain JSON with the checksum of all bytes before it as the last field. Nothing in a
checkpoint is executable: no pickle is written or read. A manifest may come from anywhere, so file names
that leave the directory, chunks outside their tensor or doubled, and shapes larger than the files are
refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from trainer.checkpoint.boxes import Box, cover_fault
from trainer.checkpoint.digest import DIGEST
from trainer.checkpoint.shards import DTYPES

FORMAT = "muster-checkpoint"
VERSION = 1
ALGORITHM = "xxh3_128"
MANIFEST = "manifest.json"

_STEP = re.compile(r"step-(\d{8,})(\.replaced)?")
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
_SEAL = f',\n "checksum": "{ALGORITHM}:'.encode()
_LARGEST = 1 << 62


class InvalidCheckpoint(Exception):
    """A checkpoint that must not be used: which file, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


@dataclass(frozen=True)
class FileEntry:
    """A shard's size in bytes and xxh3_128."""

    bytes: int
    checksum: str


@dataclass(frozen=True)
class Chunk:
    """Where a box of a tensor is stored: the whole of ``key`` in ``file``."""

    file: str
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def box(self) -> Box:
        return self.offsets, self.shape


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the run; its chunks cover it exactly once. ``dtype`` as safetensors writes it."""

    dtype: str
    global_shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Blob:
    """A tensor of one rank, stored whole."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but the tensors' values."""

    step: int
    world_size: int
    weights_digest: str
    info: dict[str, Any]
    trainer: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    rank_tensors: dict[str, dict[str, Blob]]

    def render(self) -> bytes:
        """The bytes of ``manifest.json``, sealed with their own checksum."""
        body = {"format": FORMAT, "version": VERSION, "checksum_algorithm": ALGORITHM, **asdict(self)}
        text = json.dumps(body, indent=1).encode().removesuffix(b"\n}")
        return text + _seal(text)


def step_name(step: int) -> str:
    """Directory name of a committed step."""
    return f"step-{step:08d}"


def shard_name(rank: int) -> str:
    """File name of a rank's tensors."""
    return f"shard-{rank:05d}.safetensors"


def step_directories(directory: Path) -> list[tuple[int, Path]]:
    """Committed steps, newest first; one that is just being replaced comes after its replacement."""
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def read_manifest(directory: Path) -> Manifest:
    """Read and check ``directory/manifest.json``; the shards are not touched.

    Raises:
        InvalidCheckpoint: missing, truncated, altered, or saying what cannot be.
    """
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
        body = json.loads(_unsealed(raw))
        return parse_manifest(body)
    except FileNotFoundError:
        raise InvalidCheckpoint(path, "is missing") from None
    except OSError as error:
        raise InvalidCheckpoint(path, f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(path, f"is not a valid manifest: {error}") from error


def _seal(text: bytes) -> bytes:
    return _SEAL + xxhash.xxh3_128_hexdigest(text).encode() + b'"\n}\n'


def _unsealed(raw: bytes) -> bytes:
    cut = raw.rfind(_SEAL)
    if cut < 0:
        raise ValueError("its end is missing")
    if raw[cut:] != _seal(raw[:cut]):
        raise ValueError("it has changed: its checksum does not agree")
    return raw[:cut] + b"\n}"


def parse_manifest(body: Any) -> Manifest:
    """A manifest from JSON values, every field checked.

    Raises:
        ValueError: what is wrong, naming the field.
    """
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"field format is not {FORMAT!r}")
    if body.get("version") != VERSION or body.get("checksum_algorithm") != ALGORITHM:
        raise ValueError(
            f"version {body.get('version')!r} with {body.get('checksum_algorithm')!r} checksums "
            f"is not version {VERSION} with {ALGORITHM!r}, which this release reads"
        )
    digest = _field(body, "weights_digest", str)
    if not DIGEST.fullmatch(digest):
        raise ValueError("field weights_digest is not 32 hex digits")
    manifest = Manifest(
        step=_size(body, "step"),
        world_size=_size(body, "world_size"),
        weights_digest=digest,
        info=_field(body, "info", dict),
        trainer=_field(body, "trainer", dict),
        files={name: parse_file(name, node) for name, node in _nodes(body, "files")},
        tensors={name: parse_tensor(name, node) for name, node in _nodes(body, "tensors")},
        rank_tensors={
            rank: {name: parse_blob(name, node) for name, node in _nodes(blobs, None)}
            for rank, blobs in _nodes(body, "rank_tensors")
        },
    )
    _check_references(manifest)
    for name, entry in manifest.tensors.items():
        if fault := cover_fault(entry.global_shape, [chunk.box for chunk in entry.chunks]):
            raise ValueError(f"tensor {name}: {fault}")
    return manifest


def parse_file(name: str, node: dict[str, Any]) -> FileEntry:
    """A file entry; refuses any name that is not a shard's, hence any path out of the directory."""
    if not _SHARD.fullmatch(name):
        raise ValueError(f"file name {name!r} is not shard-NNNNN.safetensors")
    return FileEntry(_size(node, "bytes"), _field(node, "checksum", str))


def parse_tensor(name: str, node: dict[str, Any]) -> TensorEntry:
    """A tensor entry; whether its chunks cover it is checked apart."""
    chunks = []
    for chunk in _field(node, "chunks", list):
        if not isinstance(chunk, dict):
            raise ValueError(f"tensor {name}: a chunk is not an object")
        chunks.append(
            Chunk(
                _field(chunk, "file", str),
                _field(chunk, "key", str),
                _shape(chunk, "offsets"),
                _shape(chunk, "shape"),
            )
        )
    return TensorEntry(_dtype(node), _shape(node, "global_shape"), tuple(chunks))


def parse_blob(name: str, node: dict[str, Any]) -> Blob:
    """An entry of ``rank_tensors``."""
    return Blob(_field(node, "file", str), _field(node, "key", str), _dtype(node), _shape(node, "shape"))


def _check_references(manifest: Manifest) -> None:
    """Every stored key is used once, in a listed file that is large enough for what it is said to hold."""
    seen: set[tuple[str, str]] = set()
    room = {name: entry.bytes for name, entry in manifest.files.items()}
    for owner, file, key, dtype, shape in _references(manifest):
        if file not in room:
            raise ValueError(f"{owner} is in file {file!r}, which is not listed")
        if (file, key) in seen:
            raise ValueError(f"{owner} shares key {key!r} of {file} with another chunk")
        seen.add((file, key))
        room[file] -= math.prod(shape) * DTYPES[dtype].itemsize
        if room[file] < 0:
            raise ValueError(f"{owner} of shape {list(shape)} is larger than {file}")


def _references(manifest: Manifest) -> Iterator[tuple[str, str, str, str, tuple[int, ...]]]:
    for name, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            yield f"tensor {name}", chunk.file, chunk.key, entry.dtype, chunk.shape
    for rank, blobs in manifest.rank_tensors.items():
        for name, blob in blobs.items():
            yield f"tensor {name} of rank {rank}", blob.file, blob.key, blob.dtype, blob.shape


def _field(node: dict[str, Any], key: str, kind: type) -> Any:
    value = node.get(key)
    if type(value) is not kind:  # ``isinstance`` would take true for 1
        raise ValueError(f"field {key} is not of type {kind.__name__}")
    return value


def _size(node: dict[str, Any], key: str) -> int:
    value: int = _field(node, key, int)
    if not 0 <= value < _LARGEST:
        raise ValueError(f"field {key} is out of range")
    return value


def _shape(node: dict[str, Any], key: str) -> tuple[int, ...]:
    values = _field(node, key, list)
    if not all(type(value) is int and 0 <= value < _LARGEST for value in values):
        raise ValueError(f"field {key} is not a list of sizes")
    return tuple(values)


def _dtype(node: dict[str, Any]) -> str:
    name: str = _field(node, "dtype", str)
    if name not in DTYPES:
        raise ValueError(f"field dtype {name!r} is not one of {', '.join(DTYPES)}")
    return name


def _nodes(parent: dict[str, Any], key: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, node in (parent if key is None else _field(parent, key, dict)).items():
        if not isinstance(node, dict):
            raise ValueError(f"entry {name} is not an object")
        yield name, node
