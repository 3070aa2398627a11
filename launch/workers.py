"""The worker processes of one generation: started, watched and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from launch.failure import Failure, diagnose, signal_name
from launch.liveness import Hang, find_hang, stacks
from launch.standby import ForkedProcess, Standby, StandbyLost
from trainer.liveness import Page, Vitals, page_file
from trainer.metrics.jsonl import decode

if TYPE_CHECKING:
    import torch.distributed as dist

_TAIL_BYTES = 4000
_TAIL_LINES = 12
_REPORT_BYTES = 1 << 16
_LOOK_SECONDS = 0.2
_PROGRAM = [sys.executable, "-m", "trainer"]


@dataclass(frozen=True)
class Plan:
    """What a node starts in every generation.

    Attributes:
        command: argv of a worker, the same for every rank.
        num_workers: ranks of this node.
        env: variables for every worker, on top of this process's own.
        master_port: of the store of all nodes, which outlives generations; 0: this machine gets one of its own.
        first_rank, world_size: where this node's ranks stand; by default it is the whole world.
        heartbeat_seconds: how long a suspended worker may stay so.
        standby: forks workers of :func:`worker_command`; None: each is started as a process of its own.
    """

    command: Sequence[str]
    num_workers: int
    env: Mapping[str, str]
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    first_rank: int = 0
    world_size: int | None = None
    heartbeat_seconds: float = 3.0
    standby: Standby | None = None

    def starter(self, run_dir: Path) -> Callable[[int, bool], WorkerGroup]:
        """What starts the workers of a generation, given its number and whether they check their exchanges."""
        return lambda generation, check: WorkerGroup(self, run_dir, generation, check)


@dataclass
class Worker:
    """One process.

    Attributes:
        report_file: what it says about its own death, in memory: a full disk must not silence it.
        page: where it writes its signs of life.
        seen_alive: unix time when it last was.
        code: its exit code (−signal).
        hang: why it was ended; None: it was not, or of another cause.
        bereft: of what it cannot go on without, for which it was ended.
        evidence: its stacks before that.
    """

    rank: int
    process: subprocess.Popen[bytes] | ForkedProcess
    log: Path
    report_file: BinaryIO
    page: Page
    seen_alive: float
    code: int | None = None
    hang: Hang | None = None
    bereft: str = ""
    evidence: str = ""

    def vitals(self) -> Vitals:
        """What it last told of itself."""
        return self.page.read()

    def kill(self) -> None:
        """SIGKILL it, suspended or not, with its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.send_signal(signal.SIGKILL)  # it may have no group of its own yet

    def is_orphaned(self) -> bool:
        """Whether it ended because the standby did."""
        return isinstance(self.process, ForkedProcess) and self.process.orphaned

    def is_stopped(self) -> bool:
        """Whether it lives but is suspended (SIGSTOP, a debugger)."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in ("T", "t")

    def report(self) -> dict[str, Any] | None:
        """What it wrote about its own death: {kind, cause, exit_code}, with the ``time`` of writing."""
        descriptor = self.report_file.fileno()
        found = decode(os.pread(descriptor, _REPORT_BYTES, 0))
        return None if found is None else {**found, "time": os.fstat(descriptor).st_mtime}

    def log_tail(self) -> str:
        """The end of what it printed."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-_TAIL_LINES:])


class WorkerGroup:
    """The workers of one generation. Leaving the context kills whatever still lives.

    Start it from the main thread: a worker dies with the thread that started it (trainer/process.py).
    """

    settle_seconds = 0.5

    def __init__(self, plan: Plan, run_dir: Path, generation: int, check_exchanges: bool = False) -> None:
        self.generation = generation
        if check_exchanges:
            plan = replace(plan, env={**plan.env, "MUSTER_CHECK_EXCHANGES": "1"})
        self.workers: list[Worker] = []
        self._store: dist.TCPStore | None = None
        self._heartbeat_seconds, self._looked = plan.heartbeat_seconds, time.monotonic()
        folder = run_dir / "logs" / f"generation-{generation}"
        folder.mkdir(parents=True, exist_ok=True)
        self._standby = plan.standby if plan.standby is not None and plan.standby.prepare() else None
        try:
            try:
                self._start_all(plan, run_dir, folder)
            except StandbyLost:
                self.kill()
                self.workers, self._standby = [], None
                self._start_all(plan, run_dir, folder)
        except BaseException:
            self.kill()
            raise

    def _start_all(self, plan: Plan, run_dir: Path, folder: Path) -> None:
        self._own_store = not plan.master_port
        if self._own_store:
            plan = replace(plan, master_port=self._store_port())
        for local_rank in range(plan.num_workers):
            self.workers.append(self._start(plan, run_dir, folder, local_rank))

    def _store_port(self) -> int:
        if self._standby is not None:
            return self._standby.store_port()
        import torch.distributed as dist

        # Its thread lives as long as this object.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return self._store.port

    def _start(self, plan: Plan, run_dir: Path, folder: Path, local_rank: int) -> Worker:
        rank = plan.first_rank + local_rank
        log, report_file = folder / f"rank-{rank}.log", _memory_file()
        env = {
            **os.environ,
            **plan.env,
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(plan.world_size or plan.num_workers),
            "LOCAL_WORLD_SIZE": str(plan.num_workers),
            "MASTER_ADDR": plan.master_addr,
            "MASTER_PORT": str(plan.master_port),
            "MUSTER_AGENT": "1",
            "MUSTER_AGENT_PID": str(os.getpid()),
            "MUSTER_RUN_DIR": str(run_dir),
            "MUSTER_GENERATION": str(self.generation),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",  # a segfault leaves its stack in the log
        }
        page = page_file()
        files = {"MUSTER_ERROR_FILE": report_file.fileno(), "MUSTER_PAGE": page}
        process: subprocess.Popen[bytes] | ForkedProcess
        with log.open("ab") as output:
            if self._standby is not None:
                process = self._standby.fork(plan.command[len(_PROGRAM) :], env, output, files)
            else:
                # Its own session, so that the terminal's Ctrl-C reaches the agent alone.
                process = subprocess.Popen(
                    list(plan.command),
                    env=env | {name: f"/dev/fd/{file}" for name, file in files.items()},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=list(files.values()),
                )
        try:
            return Worker(rank, process, log, report_file, Page(page), seen_alive=time.time())
        finally:
            os.close(page)

    def codes(self) -> list[int | None]:
        """Look at every worker: its exit code, None while it lives."""
        for worker in self.workers:
            if worker.code is None:
                now = time.time()
                worker.code = worker.process.poll()
                if worker.code is None:
                    worker.seen_alive = now
        self._look_at_store()
        self._look_for_hangs()
        return [worker.code for worker in self.workers]

    def _look_at_store(self) -> None:
        """Without their store workers that start would wait for each other until a timeout."""
        code = self._standby.store_ended() if self._standby is not None and self._own_store else None
        if code is None or self._standby is None or not self._standby.is_alive:
            return
        how = signal_name(-code) if code < 0 else f"exit code {code}"
        for worker in self.alive:
            worker.bereft = worker.bereft or f"the process that hosts the store ended ({how})"
            worker.kill()

    def _look_for_hangs(self) -> None:
        """End a worker that hangs, after its stacks were written; the others follow as after any death."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS or any(worker.hang for worker in self.workers):
            return
        self._looked = now
        hang = find_hang(self.workers, self._heartbeat_seconds)
        if hang is not None:
            hang.worker.evidence = stacks(self.workers, hang.worker)
            hang.worker.hang = hang
            hang.worker.kill()

    def failure(self) -> Failure | None:
        """The most likely origin of what has failed so far."""
        return diagnose(self.workers)

    def committed(self) -> int | None:
        """The newest step whose state is complete in any tier."""
        return max((worker.vitals().committed for worker in self.workers), default=0) or None

    def asked_to_stop(self) -> str | None:
        """Who beside this process wants the run to stop: nobody."""
        return None

    def regroup(self) -> str | None:
        """Why it is to start again in another layout: it is one node's, and never is."""
        return None

    @property
    def alive(self) -> list[Worker]:
        """Workers not known to have exited."""
        return [worker for worker in self.workers if worker.code is None]

    def terminate(self) -> None:
        """Ask every worker to save and go."""
        for worker in self.alive:
            worker.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL every worker that lives, stopped ones too, with its children, and wait for their end."""
        for worker in self.alive:
            worker.kill()
        for worker in self.workers:
            worker.code = worker.process.wait()
        if self._standby is not None:
            self._standby.forget([w.process for w in self.workers if isinstance(w.process, ForkedProcess)])

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def _memory_file() -> BinaryIO:
    """A file without a name; off any disk where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("muster-report"), "r+b")
    return tempfile.TemporaryFile()


def worker_command(config: Path) -> list[str]:
    """The command of a real worker."""
    return [*_PROGRAM, "--config", str(config)]
