"""A save that fails does not end training; too many in a row do, on every rank alike."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import checkpointer, one_process

from trainer.checkpoint.durable import DurableCheckpointer
from trainer.checkpoint.failed import FailedSave, FailedSaves
from trainer.checkpoint.files import StorageError


class Events:
    """Takes the events of rank 0, as its log does."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def event(self, event: str, step: int, **fields: Any) -> None:
        self.seen.append({"event": event, "step": step, **fields})


def save(checkpoints: DurableCheckpointer, step: int) -> None:
    checkpoints.save(
        step, one_process({"model.w": torch.full((8, 8), float(step))})[0], {"step": step}, {}, {}
    )


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A directory on a read-only file system, remounted by the test."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m,ro", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_training_goes_on_and_the_event_says_what_happened(unwritable: Path) -> None:
    log = Events()
    own = checkpointer(unwritable / "checkpoints")
    failed = FailedSaves(own, 3, log)  # type: ignore[arg-type]
    for step in (1, 2):
        failed.agree([failed.own()])
        save(own, step)
        own.join()
        failed.report()
        failed.report()
    assert [(event["step"], event["kind"], event["rank"]) for event in log.seen] == [
        (1, "storage", 0),
        (2, "storage", 0),
    ]
    assert "read-only" in log.seen[0]["cause"] and str(unwritable) in log.seen[0]["path"]
    subprocess.run(["mount", "-o", "remount,rw", str(unwritable)], check=True)
    failed.agree([failed.own()])
    assert failed.in_a_row == 2
    save(own, 3)
    failed.agree([failed.own()])
    assert failed.in_a_row == 0 and own.committed(3) and len(log.seen) == 2


def test_too_many_in_a_row_stop_every_rank_in_the_same_place(tmp_path: Path) -> None:
    told = FailedSave(4, 1, "node-1", str(tmp_path), "the disk is full", "free space", 1.0)
    ranks = [FailedSaves(checkpointer(tmp_path, rank, 2), 2, Events()) for rank in (0, 1)]  # type: ignore[arg-type]
    for rank in ranks:
        assert rank.own() is None
        rank.agree([None, told])  # rank 0 had seen nothing of it
        rank.agree([None, None])
        rank.agree([None, told])
        with pytest.raises(StorageError, match=r"2 saves in a row failed \(checkpoint.max_failed_saves=2\)"):
            rank.agree([told, None])


def test_a_fault_of_the_writer_itself_is_no_storage_failure(tmp_path: Path) -> None:
    own = checkpointer(tmp_path, 0, 2)
    failed = FailedSaves(own, 3, Events())  # type: ignore[arg-type]
    torn = tmp_path / ".step-00000001.gen0-1.tmp" / "part-00001.json"
    torn.parent.mkdir()
    torn.write_text("{")
    save(own, 1)
    with pytest.raises(json.JSONDecodeError):
        failed.own()


def test_a_best_link_that_cannot_be_written_is_told_like_a_failed_save(unwritable: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(unwritable)], check=True)
    own = checkpointer(unwritable / "checkpoints")
    save(own, 1)
    own.join()
    subprocess.run(["mount", "-o", "remount,ro", str(unwritable)], check=True)
    own.mark_best(1)  # on rank 0 alone: it must not leave the others behind
    told = FailedSaves(own, 3, Events()).own()  # type: ignore[arg-type]
    assert told is not None and "read-only" in told.cause and told.step == 1
