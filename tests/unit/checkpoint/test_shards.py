"""The file of a shard: the same bytes on the disk as in memory, whatever the file system can do."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from trainer.checkpoint import shards
from trainer.checkpoint.pages import PAGE, empty_pages


def image_of(tensor: torch.Tensor) -> shards.ShardImage:
    image = shards.lay_out([("a", tensor), ("b", torch.ones(2, 3))], empty_pages)
    image.tensors["a"].copy_(tensor)
    image.tensors["b"].fill_(tensor.numel())
    return image


@pytest.mark.parametrize("size", [0, 1, PAGE - 200, PAGE, 3 * PAGE - 1, 6 * PAGE, 7 * PAGE + 5])
def test_every_size_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(shards, "_BLOCK", 3 * PAGE)
    tensor = torch.randint(0, 255, (size,), dtype=torch.uint8)
    image = image_of(tensor)
    checksum = shards.write_shard(tmp_path / "shard", image)
    assert shards.file_fault(tmp_path / "shard", image.size, checksum, from_disk=True) is None
    with safe_open(tmp_path / "shard", "pt") as file:
        assert torch.equal(file.get_tensor("a"), tensor)
        assert torch.equal(file.get_tensor("b"), torch.full((2, 3), float(size)))


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT on this system")
@pytest.mark.parametrize("fault", ["refuses", "cuts short", "is full"])
def test_a_file_system_that_is_particular_past_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    write, direct = os.write, []

    def particular(descriptor: int, data: memoryview) -> int:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if not flags & os.O_DIRECT:
            return write(descriptor, data)
        direct.append(len(data))
        if fault == "is full":
            raise OSError(errno.ENOSPC, "full")
        if fault == "refuses":
            raise OSError(errno.EINVAL, "blocks are larger here")
        if len(direct) > 1:
            return write(descriptor, data)  # which the system refuses, for its place
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        count = write(descriptor, data[:777])
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        return count

    probe = tmp_path / "probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    monkeypatch.setattr(os, "write", particular)
    image = image_of(torch.randn(9, PAGE))
    if fault == "is full":
        with pytest.raises(OSError, match="full"):
            shards.write_shard(tmp_path / "shard", image)
        return
    checksum = shards.write_shard(tmp_path / "shard", image)
    assert shards.file_fault(tmp_path / "shard", image.size, checksum) is None
    assert len(direct) == {"refuses": 1, "cuts short": 2}[fault]


def test_what_changed_on_the_disk_is_found(tmp_path: Path) -> None:
    image = image_of(torch.randn(3, PAGE))
    checksum = shards.write_shard(tmp_path / "shard", image)
    good = (tmp_path / "shard").read_bytes()
    for bad, said in ((good[:-1], "bytes, not"), (good[:-1] + bytes([good[-1] ^ 1]), "has changed")):
        (tmp_path / "shard").write_bytes(bad)
        for from_disk in (False, True):
            assert said in str(shards.file_fault(tmp_path / "shard", image.size, checksum, from_disk))
