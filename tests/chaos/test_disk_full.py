"""A disk that is full or fills up: said with path and sizes, no restarts, no checkpoint lost."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import CALM, Workplace
from tests.commands.plugins import entry, fill
from tests.commands.watch import assert_nothing_left, assert_one_error, checkpoints_of
from trainer.checkpoint.resume import newest_valid

RUN = [*CALM, "checkpoint.every=4"]
CHECKPOINT_BYTES = 1_200_000
"""What one of this model takes, roughly."""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """Mounts a tmpfs of a given size; gone after the test."""
    target = tmp_path / "disk"
    target.mkdir()
    yield target
    subprocess.run(["umount", "--lazy", str(target)], check=False)


def mount_tmpfs(target: Path, size: str) -> None:
    """Skips the test where mounting is not permitted."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(target)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"needs a small disk of its own: {done.stderr.strip()}")


def test_no_room_for_one_checkpoint_is_said_before_training(workplace: Workplace, mount: Path) -> None:
    mount_tmpfs(mount, "1m")
    output = workplace.train(*RUN, f"run.root={mount}", expect=2)
    assert_one_error(output, "run.root=", str(mount), "a checkpoint needs 1,", "bytes are free there")
    run_dir = mount / "e2e" / "a"
    assert not (run_dir / "metrics.jsonl").read_bytes(), "nothing was trained"
    assert checkpoints_of(run_dir) == []
    assert_nothing_left(workplace)


def test_a_disk_that_fills_up_costs_no_checkpoint(workplace: Workplace, calm: Workplace, mount: Path) -> None:
    mount_tmpfs(mount, "8m")
    run_dir, ballast = mount / "e2e" / "a", mount / "ballast"
    filling = {"ballast": str(ballast)}
    room_for_logs = entry("FillDisk", step=6, leave=CHECKPOINT_BYTES // 2, committed=4, **filling)
    root = f"run.root={mount}"

    output = workplace.train(*RUN, root, f"callbacks=[{room_for_logs}]", expect=2)
    assert_one_error(output, f"checkpoint={run_dir}/checkpoints", "the disk is full", "bytes free")
    needed, free = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes (?:needed|free)", output))
    assert needed > free
    assert checkpoints_of(run_dir) == ["step-00000004"]
    assert_still_valid(run_dir, 4)
    assert not workplace.events("failure", run_dir), "what no restart can mend is not restarted"
    assert_nothing_left(workplace)

    fill(ballast, 0)
    output = workplace.resume(run_dir=run_dir, expect=2)
    assert_one_error(output, str(run_dir), "cannot be written: No space left on device")
    assert_still_valid(run_dir, 4)

    ballast.unlink()
    no_room = entry("FillDisk", step=10, leave=0, committed=8, **filling)
    output = workplace.resume(f"callbacks=[{no_room}]", run_dir=run_dir, expect=2)
    assert_one_error(output, str(run_dir), "the disk is full", "bytes needed, 0 bytes free")
    assert_still_valid(run_dir, 8)
    assert not workplace.events("failure", run_dir)
    assert_nothing_left(workplace)

    ballast.unlink()
    workplace.resume("callbacks=[]", run_dir=run_dir)
    assert workplace.digest(run_dir) == calm.digest()
    assert workplace.losses(run_dir) == calm.losses()


def assert_still_valid(run_dir: Path, step: int) -> None:
    """The newest checkpoint is that of the step, and every byte of it is sound."""
    newest = newest_valid(run_dir / "checkpoints", lambda path, reason: pytest.fail(f"{path} {reason}"))
    assert newest is not None and newest.step == step
