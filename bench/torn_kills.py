"""Saves that die at each of their system calls, and what is found afterwards. Started by bench.torn.

    LD_PRELOAD=torn_calls.so python -m bench.torn_kills FOLDER EVERY torn_calls.so

One process imports everything once and forks a child a kill. The child, two ranks in threads, clears away what the
one before left, then saves step 2 and names it the best, saves step 2 again with other contents (as after a
rollback), then step 3; ``keep_last=1``, so older steps are removed on the way. Only these calls count: those that
create, write, flush, rename or remove something under the run's directory.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import torch

from parallel.engines.base import StateSlice
from trainer.checkpoint.durable import DurableCheckpointer, remove_stale
from trainer.checkpoint.resume import Checkpoint, newest_valid

WAYS = ("before", "after", "half")
"""The process dies before the call, after it, or after a write of the first half of its bytes."""
NUM_RANKS, ROWS, COLUMNS = 2, 8, 4096
SAVES = ((2, 0), (2, 1), (3, 0))
"""(step, version) in the order of the child's saves; step 1 is committed before."""


def state_of(step: int, version: int, rank: int) -> list[StateSlice]:
    """A rank's half of two tensors that tell step and version in every element."""
    rows, value = ROWS // NUM_RANKS, step + version / 4
    return [
        StateSlice(name, (ROWS, COLUMNS), (rank * rows, 0), torch.full((rows, COLUMNS), sign * value), True)
        for name, sign in (("model.experts.w", 1.0), ("optim.exp_avg.experts.w", -1.0))
    ]


def save_all(
    directory: Path, attempt: str, saves: tuple[tuple[int, int], ...], told: int | None = None
) -> None:
    """Save as two ranks; a byte into ``told`` for every save that both of them know to be committed."""
    remove_stale(directory, attempt)
    barrier = threading.Barrier(NUM_RANKS)

    def run(rank: int) -> None:
        own = DurableCheckpointer(
            directory, rank, NUM_RANKS, attempt, keep_last=1, keep_every=0, timeout_seconds=60
        )
        for step, version in saves:
            own.save(step, state_of(step, version, rank), {"step": step, "version": version}, {}, {})
            if (step, version) == (2, 0):
                own.mark_best(step)
            own.wait()
            barrier.wait()
            if rank == 0 and told is not None:
                os.write(told, b".")
            barrier.wait()

    other = threading.Thread(target=run, args=(1,))
    other.start()
    run(0)
    other.join()


def fault(directory: Path, num_told: int) -> str | None:
    """What is wrong with what a start would find after ``num_told`` saves; None: nothing."""
    skipped: list[str] = []
    try:
        found = newest_valid(directory, lambda path, reason: skipped.append(f"{path.name} {reason}"))
    except Exception as error:
        return f"lost: {error}"
    if found is None:
        return "lost: no checkpoint"
    if skipped:
        return f"lost: a damaged checkpoint stands under its final name: {skipped}"
    done = [(1, 0), *SAVES]
    at = (found.step, found.trainer["version"])
    if at not in done or done.index(at) < num_told:
        return f"lost: {at} was found, {done[num_told]} had been committed"
    return wrong(found)


def wrong(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the contents of a checkpoint that is taken for valid."""
    step, version = checkpoint.trainer["step"], checkpoint.trainer["version"]
    if checkpoint.step != step:
        return f"wrong: manifest of step {checkpoint.step} with the state of {step}"
    for rank in range(NUM_RANKS):
        for part in state_of(step, version, rank):
            if not torch.equal(
                checkpoint.read(part.name, part.offsets, tuple(part.tensor.shape)), part.tensor
            ):
                return f"wrong: {part.name} of step {step} has other values"
    return None


def kill_one(preloaded: ctypes.CDLL, base: Path, place: Path, at: int, way: int) -> tuple[bool, str | None]:
    """Let one child die at its ``at``-th call. Returns whether it died there, and what was wrong then."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(base, place, symlinks=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            preloaded.arm(os.fsencode(place), ctypes.c_long(at), way)
            save_all(place, "child", SAVES, writing)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        num_told = len(pipe.read())
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, f"the child failed at call {at}"
        return False, fault(place, len(SAVES))
    assert os.WTERMSIG(status) == signal.SIGKILL
    found = fault(place, num_told)
    if found is None:  # and the run can go on from there
        save_all(place, "after", ((4, 0),))
        newest = newest_valid(place)
        if newest is None or newest.step != 4 or wrong(newest):
            found = "lost: the next save was not found"
        elif [path.name for path in place.iterdir() if path.name.startswith(".")]:
            found = "lost: something was left behind"
    return True, found


def main() -> None:
    folder, every, library = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    preloaded = ctypes.CDLL(library)  # the one that is loaded already
    base = folder / "base"
    save_all(base, "base", ((1, 0),))
    counts: Counter[str] = Counter()
    faults: list[str] = []
    at, alive = 1, 0
    while alive < len(WAYS):
        alive = 0
        for way, name in enumerate(WAYS):
            died, found = kill_one(preloaded, base, folder / "run", at, way)
            alive += not died
            counts[name] += died
            if found is not None:
                faults.append(f"call {at}, {name}: {found}")
        at += every
    print(json.dumps({"calls": at - every - 1, "kills": dict(counts), "faults": faults}))


if __name__ == "__main__":
    main()
