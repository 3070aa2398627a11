"""kill -9 of a real writer at random moments: what is committed stays whole, whatever was under way."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from checkpoint_helpers import expert_layout, load
from checkpoint_writer import save_for_ever, state_of

from trainer.checkpoint.durable import remove_stale
from trainer.checkpoint.resume import newest_valid

ROUNDS = 5


def test_a_killed_writer_always_leaves_a_valid_newest_checkpoint(tmp_path: Path) -> None:
    # A fork server that has imported torch once; the writers themselves are real processes.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["checkpoint_writer"])
    rng = random.Random(0)
    last = torn = rounds = 0
    while rounds < ROUNDS or (torn == 0 and rounds < 100):
        rounds += 1
        writer = context.Process(target=save_for_ever, args=(tmp_path, last + 1, f"gen{rounds}"))
        writer.start()
        deadline = time.monotonic() + 60
        while not (tmp_path / f"step-{last + 1:08d}").exists():
            assert writer.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))  # where in a save the kill falls, not a wait for anything
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        torn += any(path.name.startswith(".step-") for path in tmp_path.iterdir())
        found = newest_valid(tmp_path, lambda path, reason: pytest.fail(f"{path} {reason}"))
        assert found is not None and found.step > last
        assert found.trainer["step"] == found.step
        load(found, expert_layout(state_of(found.step), 3, 1), state_of(found.step))
        last = found.step
    assert torn > 0, "no kill fell into a save"
    remove_stale(tmp_path, "none")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
