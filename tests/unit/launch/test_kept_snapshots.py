"""Snapshots that outlive their run take memory: who looks is told where, how much, and who frees it."""

from __future__ import annotations

import os
from pathlib import Path

from launch.doctor import _snapshots
from launch.local import tell_of_snapshots
from launch.outcome import EXIT_DONE, EXIT_GAVE_UP, Outcome
from trainer.checkpoint.lease import Kept, Lease, kept, memory_base, memory_folder


def leave(memory: Path, run_dir: Path) -> tuple[Path, Lease]:
    """A run's folder with 3 MiB of slots, and its lease, held."""
    folder = memory_folder(str(memory), run_dir)
    lease = Lease(folder, run_dir)
    for number in range(3):
        (folder / f"rank-00000.slot-{number}").write_bytes(bytes(1 << 20))
    return folder, lease


def test_a_dead_runs_memory_is_told_from_a_live_ones(tmp_path: Path) -> None:
    folder, lease = leave(tmp_path, tmp_path / "run")
    found = kept(folder)
    assert found is not None and found.held and found.run_dir == tmp_path / "run"
    assert 3 << 20 <= found.bytes < 4 << 20
    os.close(lease._descriptor)
    assert kept(folder) == Kept(folder, found.run_dir, found.bytes, held=False)
    assert kept(tmp_path / "nothing") is None


def test_the_doctor_names_it(tmp_path: Path) -> None:
    assert list(_snapshots(memory_base(str(tmp_path)))) == []
    dead, lease = leave(tmp_path, tmp_path / "dead")
    os.close(lease._descriptor)
    _, live = leave(tmp_path, tmp_path / "live")
    first, second = _snapshots(memory_base(str(tmp_path)))
    assert first.state == "note" and f"3 MiB of memory in {dead}, of {tmp_path / 'dead'}" in first.value
    assert first.advice.endswith(f"rm -r {dead}")
    assert second.state == "ok" and second.value.endswith(f"of {tmp_path / 'live'}, which is at work")
    os.close(live._descriptor)


def test_a_run_that_gave_up_says_what_it_keeps(tmp_path: Path) -> None:
    gave_up = Outcome(EXIT_GAVE_UP, "Gave up.")
    assert tell_of_snapshots(gave_up, str(tmp_path), tmp_path / "run") == gave_up
    folder, lease = leave(tmp_path, tmp_path / "run")
    os.close(lease._descriptor)
    told = tell_of_snapshots(gave_up, str(tmp_path), tmp_path / "run")
    assert told.code == EXIT_GAVE_UP
    assert told.message.startswith("Gave up.\n") and f"3 MiB of memory in {folder};" in told.message
    done = Outcome(EXIT_DONE)
    assert tell_of_snapshots(done, str(tmp_path), tmp_path / "run") == done
