"""Real refusals of a file system: full, read-only, forbidden."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import checkpointer, expert_layout, in_threads, load, one_process, visible

from parallel.errors import ConfigError
from trainer.checkpoint.durable import StorageError, check_room, check_writable
from trainer.checkpoint.resume import newest_valid

MIB = 1 << 20


def state(kib: int, value: float) -> dict[str, torch.Tensor]:
    return {"model.experts.w": torch.full((8, kib * 32), value)}


def mount(options: str, target: Path) -> None:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    target = tmp_path / "disk"
    target.mkdir()
    try:
        mount("size=1m", target)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    yield target
    subprocess.run(["umount", str(target)], check=True)


def test_disk_full_is_said_with_sizes_and_costs_no_checkpoint(small_disk: Path) -> None:
    directory = small_disk / "checkpoints"
    own = checkpointer(directory)
    own.save(1, one_process(state(300, 1.0))[0], {"step": 1}, {}, {})
    own.wait()
    own.save(2, one_process(state(900, 2.0))[0], {}, {}, {})
    with pytest.raises(StorageError) as error:
        own.wait()
    assert error.value.value == directory
    assert "the disk is full: 921,728 bytes needed" in error.value.relation
    assert "bytes free" in error.value.relation and "run.root" in error.value.fix
    assert visible(directory) == ["step-00000001"]
    checkpoint = newest_valid(directory, lambda path, reason: pytest.fail(f"{path} {reason}"))
    assert checkpoint is not None
    load(checkpoint, one_process(state(300, 1.0)), state(300, 1.0))
    # Once there is room, the same object goes on.
    own.save(3, one_process(state(400, 3.0))[0], {}, {}, {})
    own.wait()
    assert own.committed(3)


def test_disk_full_on_one_rank_reaches_all(small_disk: Path) -> None:
    directory = small_disk / "checkpoints"
    layout = expert_layout(state(1600, 1.0), 2, 0)
    ranks = [checkpointer(directory, rank, 2) for rank in range(2)]

    def run(rank: int) -> None:
        ranks[rank].save(1, layout[rank], {}, {}, {})
        ranks[rank].wait()

    errors = in_threads([lambda r=r: run(r) for r in range(2)])
    for error in errors:
        assert isinstance(error, StorageError) and "the disk is full: 819,328 bytes needed" in error.relation
    assert not list(directory.glob("*.tmp")) and not ranks[1].committed(1)


def test_a_read_only_file_system_is_named(small_disk: Path) -> None:
    directory = small_disk / "checkpoints"
    own = checkpointer(directory)
    own.save(1, one_process(state(100, 1.0))[0], {}, {}, {})
    own.wait()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(ConfigError, match="must be writable: Read-only file system"):
        check_writable(directory)
    own.save(2, one_process(state(100, 2.0))[0], {}, {}, {})
    with pytest.raises(StorageError, match="the file system is read-only"):
        own.wait()
    assert visible(directory) == ["step-00000001"]


def test_room_is_checked_against_the_disk_of_a_directory_to_be(small_disk: Path) -> None:
    check_room(small_disk / "run" / "checkpoints", MIB // 2)
    with pytest.raises(ConfigError, match="needs 2,097,152 bytes, 1,048,576 bytes are free") as error:
        check_room(small_disk / "run" / "checkpoints", 2 * MIB)
    assert error.value.field == "run.root"


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "run")
    assert visible(tmp_path / "new" / "run") == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="must be writable: Not a directory"):
        check_writable(tmp_path / "file" / "run")


def test_a_forbidden_directory_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("permissions do not bind this user (root)")
    own = checkpointer(tmp_path)
    own.save(1, one_process(state(1, 1.0))[0], {}, {}, {})
    with pytest.raises(StorageError, match="writing is not permitted"):
        own.wait()
    tmp_path.chmod(0o755)
