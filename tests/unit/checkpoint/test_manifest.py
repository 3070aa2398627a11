"""A manifest that lies, though its own checksum agrees, is refused before any tensor is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from checkpoint_helpers import one_process, save

from parallel.errors import ConfigError
from trainer.checkpoint.format import InvalidCheckpoint, read_manifest
from trainer.checkpoint.resume import open_checkpoint

NAME = "shard-00000.safetensors"


def seal(body: dict[str, Any]) -> bytes:
    """What an attacker, who can compute checksums as well as we, would write."""
    body.pop("checksum", None)
    text = json.dumps(body, indent=1).encode().removesuffix(b"\n}")
    return text + b',\n "checksum": "xxh3_128:' + xxhash.xxh3_128_hexdigest(text).encode() + b'"\n}\n'


@pytest.fixture
def step(tmp_path: Path) -> Path:
    save(tmp_path, 1, one_process({"model.w": torch.arange(12.0).reshape(3, 4), "model.b": torch.ones(2)}))
    return tmp_path / "step-00000001"


def rename_file(to: str) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body["files"][to] = body["files"].pop(NAME)
        body["tensors"]["model.w"]["chunks"][0]["file"] = to

    return change


def chunk(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["tensors"]["model.w"]["chunks"][0].update(changes)


def tensor(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body["tensors"]["model.w"].update(changes)


def top(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body.update(changes)


def overlap(body: dict[str, Any]) -> None:
    chunks = body["tensors"]["model.w"]["chunks"]
    chunks[0]["shape"] = [2, 4]
    chunks.append({"file": NAME, "key": "other", "offsets": [1, 0], "shape": [2, 4]})


def same_key_twice(body: dict[str, Any]) -> None:
    first = body["tensors"]["model.w"]["chunks"][0]
    second = copy.deepcopy(first)
    first["shape"], second["shape"], second["offsets"] = [1, 4], [2, 4], [1, 0]
    body["tensors"]["model.w"]["chunks"].append(second)


def huge(body: dict[str, Any]) -> None:
    size = 1 << 40
    tensor(global_shape=[size, 4])(body)
    chunk(shape=[size, 4])(body)


LIES = {
    "traversal": (rename_file("../shard-00000.safetensors"), "file name"),
    "absolute": (rename_file("/etc/passwd"), "file name"),
    "pickle": (rename_file("model.pt"), "file name"),
    "unlisted": (chunk(file="shard-00009.safetensors"), "not listed"),
    "overlap": (overlap, "model.w: elements are doubled"),
    "key twice": (same_key_twice, "shares key"),
    "huge": (huge, "larger than"),
    "missing rows": (chunk(shape=[2, 4]), "rows 2 to 2 of dim 0"),
    "outside": (chunk(offsets=[1, 0]), "outside"),
    "negative": (chunk(offsets=[-1, 0]), "offsets is not a list of sizes"),
    "fraction": (tensor(global_shape=[3.0, 4]), "global_shape is not a list of sizes"),
    "true for 1": (chunk(offsets=[False, 0]), "offsets is not a list of sizes"),
    "dtype": (tensor(dtype="object"), "dtype 'object' is not one of"),
    "newer": (top(version=2), "version 2"),
    "foreign": (top(format="dcp"), "format"),
    "no tensors": (top(tensors=None), "field tensors is not of type dict"),
    "text step": (top(step="1"), "field step is not of type int"),
    "digest": (top(weights_digest="x"), "weights_digest"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(step: Path, lie: str) -> None:
    change, reason = LIES[lie]
    path = step / "manifest.json"
    body = json.loads(path.read_bytes())
    assert seal(copy.deepcopy(body)) == path.read_bytes()  # the forger's seal is a true one
    change(body)
    path.write_bytes(seal(body))
    with pytest.raises(ConfigError) as error:
        open_checkpoint(step)
    assert error.value.value == path
    assert reason in error.value.relation


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", seal({"format": 1})])
def test_what_is_no_manifest_is_refused(step: Path, content: bytes) -> None:
    (step / "manifest.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"manifest.json: is not a valid manifest"):
        open_checkpoint(step)


def test_deep_nesting_is_refused(step: Path) -> None:
    text = b'{"format": ' + b"[" * 100_000 + b"]" * 100_000
    sealed = text + b',\n "checksum": "xxh3_128:' + xxhash.xxh3_128_hexdigest(text).encode() + b'"\n}\n'
    (step / "manifest.json").write_bytes(sealed)
    with pytest.raises(ConfigError, match="is not a valid manifest"):
        open_checkpoint(step)


def test_a_shard_that_does_not_hold_what_the_manifest_says(step: Path) -> None:
    path = step / "manifest.json"
    body = json.loads(path.read_bytes())
    tensor(global_shape=[4, 3])(body)
    chunk(shape=[4, 3])(body)
    path.write_bytes(seal(body))
    slices = one_process({"model.w": torch.zeros(4, 3), "model.b": torch.zeros(2)})[0]
    with pytest.raises(ConfigError, match=r"shard-00000.safetensors: holds model.w as F32\[3, 4\]"):
        open_checkpoint(step).load_into(slices)
    chunk(key="absent")(body)
    path.write_bytes(seal(body))
    with pytest.raises(ConfigError, match=r"shard-00000.safetensors: is not as its manifest says"):
        open_checkpoint(step).load_into(slices)


def test_every_bit_of_the_manifest_is_sealed(step: Path) -> None:
    path = step / "manifest.json"
    raw = path.read_bytes()
    good = read_manifest(step)
    for at in range(0, len(raw), 29):
        for bit in range(8):
            changed = bytearray(raw)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(InvalidCheckpoint, match="is not a valid manifest"):
                read_manifest(step)
    path.write_bytes(raw)
    assert read_manifest(step) == good
