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
    filling = {"ballast": str(ballast), "committed": 4}
    room_for_logs = entry("FillDisk", step=6, leave=CHECKPOINT_BYTES // 2, **filling)

    # The save of step 8 fails and training goes on; that of the last step must not.
    output = workplace.train(*RUN, f"run.root={mount}", f"callbacks=[{room_for_logs}]", expect=2)
    assert_one_error(output, f"checkpoint={run_dir}/checkpoints", "the disk is full", "bytes free")
    needed, free = (
        int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes (?:needed|free)", output)[:2]
    )
    assert needed > free
    assert checkpoints_of(run_dir) == ["step-00000004"]
    assert_still_valid(run_dir, 4)
    assert storage_failures(workplace, run_dir) == [8, 12]
    (stop,) = workplace.events("stop", run_dir)
    assert stop["kind"] == "storage" and "the disk is full" in stop["cause"] and stop["rank"] in (0, 1)
    assert not workplace.events("restart", run_dir), "what no restart can mend is not restarted"
    assert_nothing_left(workplace)

    fill(ballast, 0)
    output = workplace.resume(run_dir=run_dir, expect=2)
    assert_one_error(output, str(run_dir), "cannot be written: No space left on device")
    assert_still_valid(run_dir, 4)

    # No room for a line of a log; it comes back before the end.
    ballast.unlink()
    for_a_while = entry("FillDisk", step=6, leave=0, free_at=10, **filling)
    workplace.resume(f"callbacks=[{for_a_while}]", run_dir=run_dir)
    assert storage_failures(workplace, run_dir) == [8, 12, 8]
    began = workplace.events("start", run_dir)[-1]["time"]
    alarms = [event for event in workplace.events("alarm", run_dir) if event["time"] > began]
    assert {event["kind"] for event in alarms} == {"log_storage"}
    assert "lines wait in memory" in alarms[0]["message"] and "is written again" in alarms[-1]["message"]
    assert checkpoints_of(run_dir) == ["step-00000004", "step-00000012"]
    assert workplace.digest(run_dir) == calm.digest()
    assert workplace.losses(run_dir) == calm.losses()
    assert_nothing_left(workplace)


def storage_failures(workplace: Workplace, run_dir: Path) -> list[int]:
    """Steps of the saves that failed; each event says where, why and since when."""
    failures = workplace.events("failure", run_dir)
    for event in failures:
        assert event["kind"] == "storage" and event["rank"] in (0, 1) and event["host"], event
        assert "the disk is full" in event["cause"] and event["path"].startswith(str(run_dir))
        assert event["began"] <= event["time"]
    return [event["step"] for event in failures]


def assert_still_valid(run_dir: Path, step: int) -> None:
    """The newest checkpoint is that of the step, and every byte of it is sound."""
    newest = newest_valid(run_dir / "checkpoints", lambda path, reason: pytest.fail(f"{path} {reason}"))
    assert newest is not None and newest.step == step
