"""What a fault does to a real process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.commands.watch import wait_until
from trainer.faults.inject import Injector
from trainer.faults.kinds import Fault, write_schedule
from trainer.faults.strikes import InjectedFault, flip_bit
from trainer.liveness import STACKS_SIGNAL
from trainer.run import Place

HELD = """
import faulthandler, os, sys
from trainer.faults.strikes import STRIKES
from trainer.liveness import STACKS_SIGNAL
faulthandler.register(STACKS_SIGNAL)
print("ready", file=sys.stderr, flush=True)
STRIKES["gil-held"](None)
os._exit(0)
"""


def test_a_held_interpreter_is_not_freed_by_being_asked_for_its_stacks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", HELD], stderr=output)
    try:
        wait_until(lambda: "ready" in log.read_text(), "the fault")

        def stacks() -> int:
            # One signal is lost while the one before is answered, so as many as it takes.
            process.send_signal(STACKS_SIGNAL)
            return log.read_text().count("most recent call first")

        wait_until(lambda: stacks() >= 4, "its stacks")
        assert process.poll() is None
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_fault_of_a_rank_that_the_run_goes_on_without_strikes_the_last_one_once(tmp_path: Path) -> None:
    schedule = tmp_path / "schedule.jsonl"
    write_schedule([Fault(step=3, rank=2, kind="exception", point="forward")], schedule)

    def injector(rank: int, world_size: int) -> Injector:
        place = Place(rank, rank, world_size, 1, dist.HashStore(), agent=False)
        trainer: Any = SimpleNamespace(rank=rank)
        return Injector(schedule, trainer, place)

    for rank, world_size in ((0, 2), (0, 3), (1, 3)):
        injector(rank, world_size).reach("forward", 3, {})
    last = injector(1, 2)
    last.reach("forward", 2, {})
    with pytest.raises(InjectedFault, match="injected at forward of step 4"):
        last.reach("forward", 3, {})
    last.reach("forward", 3, {})
    injector(2, 3).reach("forward", 3, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("gap", [0, 3])
def test_one_element_changes_and_no_other(dtype: torch.dtype, gap: int) -> None:
    rows = torch.ones(5, 4 + gap, dtype=dtype)[:, :4]
    before = rows.clone()
    flip_bit(rows, 7919)
    assert (rows != before).sum() == 1 and rows[(7919 % 20) // 4, 7919 % 4] == 1.5
    flip_bit(rows, 7919)
    assert torch.equal(rows, before)
