"""Lines wait for a full disk, in order, and nothing of them is lost or written twice."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.checkpoint.files import StorageError
from trainer.metrics.jsonl import JsonlWriter, read_records
from trainer.metrics.patient import PatientWriter


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    target = tmp_path / "disk"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(target)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield target
    subprocess.run(["umount", "--lazy", str(target)], check=True)


def fill(ballast: Path) -> None:
    with ballast.open("ab", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            return


class Patient(PatientWriter):
    """Remembers what it was told of refusals and reliefs."""

    def __init__(self, path: Path, limit_bytes: int = 1 << 20) -> None:
        self.said: list[str] = []
        super().__init__(
            path,
            None,
            lambda file, reason: self.said.append(f"{file.name}: {reason}"),
            lambda file, number: self.said.append(f"{file.name}: {number} waited"),
            limit_bytes,
        )


def test_lines_come_in_order_when_there_is_room_again(disk: Path) -> None:
    file, ballast = disk / "a.jsonl", disk / "ballast"
    writer = Patient(file)
    writer.write({"step": 0})
    fill(ballast)
    for step in range(1, 200):  # the file's last page takes some of them, and a part of one
        writer.write({"step": step, "text": "-" * 90})
    assert 100 < writer.num_waiting < 199
    whole = read_records(file)
    assert [record["step"] for record in whole] == list(range(200 - writer.num_waiting))
    assert file.read_bytes().endswith(b"}\n"), "nothing of a line that did not fit"
    assert writer.said == ["a.jsonl: No space left on device"]
    held = writer.num_waiting
    ballast.unlink()
    writer.write({"step": 200})
    assert [record["step"] for record in read_records(file)] == list(range(201))
    assert writer.num_waiting == 0 and writer.said[1:] == [f"a.jsonl: {held} waited"]
    writer.close()


def test_what_another_process_appends_meanwhile_stays_whole(disk: Path) -> None:
    file, ballast = disk / "a.jsonl", disk / "ballast"
    writer, other = Patient(file), JsonlWriter(file)
    fill(ballast)
    for step in range(60):
        writer.write({"step": step, "text": "-" * 90})
    ballast.unlink()
    other.write({"step": -1})
    assert writer.flush()
    steps = [record["step"] for record in read_records(file)]
    assert sorted(steps) == list(range(-1, 60)) and [step for step in steps if step >= 0] == list(range(60))
    other.close()
    writer.close()


def test_a_rollback_forgets_waiting_lines_and_needs_no_room(disk: Path) -> None:
    file, ballast = disk / "a.jsonl", disk / "ballast"
    writer = Patient(file)
    for step in range(300):
        writer.write({"step": step})
    fill(ballast)
    for step in range(300, 600):
        writer.write({"step": step})
    assert writer.num_waiting > 0
    writer.truncate_after(250)
    assert writer.num_waiting == 0 and read_records(file)[-1] == {"step": 250}
    ballast.unlink()
    writer.write({"step": 251})
    assert [record["step"] for record in read_records(file)] == list(range(252))
    writer.close()


def test_memory_is_bounded_and_the_loss_is_said(disk: Path) -> None:
    file = disk / "a.jsonl"
    writer = Patient(file, limit_bytes=10_000)
    fill(disk / "ballast")
    with pytest.raises(
        StorageError, match=r"lines of a.jsonl could not be written: the disk is full: 1\d,\d+ b"
    ):
        for step in range(1000):
            writer.write({"step": step, "text": "-" * 90})
    assert 80 < writer.num_waiting < 110
    writer.close()
    assert writer.num_waiting, "who closes it must ask"
