"""Which worker of a node hangs: read from the pages that they write (trainer/liveness.py)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trainer.liveness import PHASES, STACKS_SIGNAL, Vitals

if TYPE_CHECKING:
    from launch.workers import Worker

_SECOND = 1_000_000_000
_STACKS_SECONDS = 1.0
_QUIET_SECONDS = 0.1
_STACK_BYTES = 6000
_MAX_THREADS, _MAX_FRAMES = 8, 12


class Hang(NamedTuple):
    """A worker that must be ended.

    Attributes:
        began: unix time of its last sign of life or progress.
        certain: whether it, and not one that it waits for, is to blame.
    """

    worker: Worker
    cause: str
    began: float
    certain: bool


def find_hang(workers: Sequence[Worker], heartbeat_seconds: float) -> Hang | None:
    """The worker to blame for a hang of these; None while all live and get on.

    Only what cannot be healthy counts: a process that does not beat *and* is suspended, or a phase that has
    passed its own deadline. A process that merely does not beat may hold the interpreter for good reasons.
    """
    now = time.monotonic_ns()
    alive = [(worker, worker.vitals()) for worker in workers if worker.code is None]
    alive = [(worker, vitals) for worker, vitals in alive if vitals.beat]
    for worker, vitals in alive:
        if now - vitals.beat > heartbeat_seconds * _SECOND and worker.is_stopped():
            seconds = (now - vitals.beat) / _SECOND
            cause = f"suspended (SIGSTOP) for {seconds:.1f} s at {vitals}"
            return Hang(worker, cause, _unix(vitals.beat, now), certain=True)
    if not any(0 < vitals.deadline < now for _, vitals in alive):
        return None
    worker, vitals = min(alive, key=lambda one: _order(one[1]))
    seconds = (now - vitals.progress) / _SECOND
    places = "; ".join(f"rank {other.rank}: {theirs}" for other, theirs in alive)
    cause = f"no progress for {seconds:.1f} s in step {vitals.step}, {PHASES[vitals.phase]}"
    cause += f", which is over its deadline. Where the ranks are: {places}"
    behind = all(_order(vitals)[:2] < _order(theirs)[:2] for other, theirs in alive if other is not worker)
    return Hang(worker, cause, _unix(vitals.progress, now), certain=behind)


def _order(vitals: Vitals) -> tuple[int, int, int]:
    return vitals.collectives, vitals.step, vitals.progress


def _unix(monotonic: int, now: int) -> float:
    return time.time() - (now - monotonic) / _SECOND


def behind(workers: Sequence[Worker]) -> Worker | None:
    """The worker that has begun fewer collectives than every other one and still lives; None if there is none."""
    told = sorted((worker.vitals().collectives, worker.rank, worker) for worker in workers)
    if len(told) < 2 or told[0][0] == 0 or told[0][0] == told[1][0]:
        return None
    return told[0][2] if told[0][2].code is None else None


def last_progress(worker: Worker) -> float | None:
    """Unix time at which it last came to another phase or collective; None: it never told."""
    vitals = worker.vitals()
    return _unix(vitals.progress, time.monotonic_ns()) if vitals.progress else None


def stacks(workers: Sequence[Worker], of: Worker) -> str:
    """Let every worker write its stacks to its log; those of one of them.

    Of one that cannot (it is suspended), what the kernel says of its threads.
    """
    asked = [worker for worker in workers if worker.code is None and worker.vitals().beat]
    sizes = {worker.rank: _size(worker.log) for worker in asked}
    for worker in asked:
        with suppress(ProcessLookupError):
            worker.process.send_signal(STACKS_SIGNAL)
    running = [worker for worker in asked if not worker.is_stopped()]
    until, last = time.monotonic() + _STACKS_SECONDS, dict(sizes)
    while time.monotonic() < until:
        time.sleep(_QUIET_SECONDS)
        found = {worker.rank: _size(worker.log) for worker in asked}
        if found == last and all(found[worker.rank] > sizes[worker.rank] for worker in running):
            break
        last = found
    if of in running:
        with suppress(OSError), of.log.open("rb") as file:
            file.seek(sizes[of.rank])
            if text := file.read(_STACK_BYTES).decode(errors="replace").strip():
                return text
    return kernel_stacks(of.process.pid)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def kernel_stacks(pid: int) -> str:
    """What each thread of a process does, as the kernel tells it; as much as this user may read."""
    lines = []
    tasks = sorted(Path(f"/proc/{pid}/task").glob("*"), key=lambda task: int(task.name))
    for task in tasks[:_MAX_THREADS]:
        told = {name: _read(task / name) for name in ("comm", "status", "wchan", "syscall", "stack")}
        state = next(
            (line for line in told["status"].splitlines() if line.startswith("State:")), "State: gone"
        )
        number = told["syscall"].split(" ")[0]
        where = told["wchan"] if told["wchan"] not in ("", "0") else "?"
        lines.append(f"thread {task.name} ({told['comm']}): {state}, in {where}, system call {number or '?'}")
        if task.name == str(pid):
            lines += [f"  {line}" for line in told["stack"].splitlines()[:_MAX_FRAMES]]
    return "\n".join(lines)[:_STACK_BYTES]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
