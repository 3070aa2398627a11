"""A process that does nothing but save, to be killed in the middle of it."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from checkpoint_helpers import State, checkpointer, expert_layout

from trainer.checkpoint.durable import remove_stale


def state_of(step: int) -> State:
    """A state that tells its step in every element."""
    return {
        "model.experts.w": torch.full((8, 16 << 10), float(step)),
        "optim.exp_avg.experts.w": torch.full((8, 16 << 10), -float(step)),
        "optim.step": torch.tensor(step),
    }


def save_for_ever(directory: Path, first_step: int, attempt: str) -> None:
    """Two ranks that save step after step; now and then a step twice, as after a rollback."""
    torch.set_num_threads(1)
    remove_stale(directory, attempt)

    def run(rank: int) -> None:
        own = checkpointer(directory, rank, 2, attempt=attempt)
        step = first_step
        while True:
            for repeat in range(2 if step % 3 == 0 else 1):
                own.save(
                    step, expert_layout(state_of(step), 2, 0)[rank], {"step": step, "repeat": repeat}, {}, {}
                )
            step += 1

    threading.Thread(target=run, args=(1,), daemon=True).start()
    run(0)
