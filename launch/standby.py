"""The agent's side of a node's standby (trainer/forkserver.py): workers that start in milliseconds.

Importing torch and the rest takes seconds, on every rank, at every restart. One process a node does it once,
while the agent is busy with other things, and is then forked as often as workers are needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from trainer.config import Device, EngineName, RunConfig
from trainer.forkserver import MAX_MESSAGE

_READY_SECONDS = 300.0
_FORK_SECONDS = 30.0
_LEAVE_SECONDS = 5.0


def standby_for(config: RunConfig, run_dir: Path, say: Callable[[str], None]) -> Standby | None:
    """The standby that a config asks for; None: it asks for none, or this system has no such thing."""
    if not config.resilience.standby:
        return None
    if sys.platform != "linux":
        say(
            "Workers are started without a standby: that takes Linux (resilience.standby=false says nothing)."
        )
        return None
    name = config.engine.name
    # What another engine imports may look for devices, after which no fork can use one.
    engine = name.value if name is not EngineName.native and config.device is Device.cpu else None
    env = {"OMP_NUM_THREADS": str(config.train.num_threads)}
    return Standby(env, engine, run_dir / "logs" / f"standby-{socket.gethostname()}.log", say)


class StandbyLost(Exception):
    """The server did not fork: it has ended, or does not answer."""


class ForkedProcess:
    """A worker that the server forked; the part of :class:`subprocess.Popen` that an agent uses.

    Attributes:
        pid: valid until :meth:`Standby.forget`, even of a process that has ended.
        orphaned: it ended with the server, as far as is known.
    """

    def __init__(self, standby: Standby, pid: int) -> None:
        self.pid, self.orphaned = pid, False
        self._standby = standby
        self._pidfd = os.pidfd_open(pid)
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code (−signal), None while it lives."""
        if self._code is None:
            self._code = self._standby.exit_of(self.pid)
            if self._code is None and not self._standby.is_alive and self._has_ended(0):
                self._code, self.orphaned = -signal.SIGKILL, True
        return self._code

    def wait(self) -> int:
        """Wait for its end."""
        while self.poll() is None:
            self._standby.listen(1.0) if self._standby.is_alive else self._has_ended(1000)
        assert self._code is not None
        return self._code

    def send_signal(self, number: int) -> None:
        """Signal it; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Forget about it."""
        os.close(self._pidfd)

    def _has_ended(self, milliseconds: int) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(milliseconds))


class Standby:
    """One server, and another in its place when it dies.

    Make it, and start workers with it, in the main thread: servers die with the thread that started them.

    Args:
        env: variables for the imports, on top of this process's own.
        engine: whose imports are made beforehand beside the native engine's; None: none.
        log: where the server's output goes.
        say: shows the user a line.
    """

    def __init__(
        self, env: Mapping[str, str], engine: str | None, log: Path, say: Callable[[str], None]
    ) -> None:
        self._env = {
            **os.environ,
            **env,
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            # Threads do not survive a fork: no library may start one when it is imported.
            "OPENBLAS_NUM_THREADS": "1",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
        }
        self._engine, self._log, self._say = engine, log, say
        self._forked: dict[int, ForkedProcess] = {}
        self._launch()

    def _launch(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._channel, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_MESSAGE)
        self._channel.setblocking(False)
        self.is_alive, self._ready = True, False
        self._pids: list[int] = []
        self._exits: dict[int, int] = {}
        self._store: ForkedProcess | None = None
        self._store_port = 0
        command = [sys.executable, "-m", "trainer.forkserver", f"--channel={theirs.fileno()}"]
        command += [f"--parent={os.getpid()}", *([f"--engine={self._engine}"] if self._engine else [])]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, self._log.open("ab") as output:
            self._server = subprocess.Popen(
                command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is for the agent
                pass_fds=[theirs.fileno()],
            )

    def prepare(self) -> bool:
        """Wait until workers can be forked. False: not now; a server that has died is started again meanwhile."""
        until = time.monotonic() + _READY_SECONDS
        self.listen(0)
        if not self.is_alive:
            self._end_server()
            self._say(f"The standby process ended; another one is being started. Its log: {self._log}")
            self._launch()
            return False
        while self.is_alive and not self._ready and time.monotonic() < until:
            self.listen(1.0)
        return self.is_alive and self._ready

    def store_port(self) -> int:
        """Where the ranks of this node find their store: a process that lives until the server does not.

        Raises:
            StandbyLost: there is none.
        """
        if self._store is not None and self.store_ended() is not None:
            self.forget([self._store])
            self._store = None
        if self._store is None:
            theirs, ours = os.pipe()
            with os.fdopen(theirs, "rb") as told:
                try:
                    with self._log.open("ab") as output:
                        self._store = self.fork([], os.environ, output, {"MUSTER_PORT_FILE": ours}, "store")
                finally:
                    os.close(ours)
                found = told.readline() if select.select([told], [], [], _FORK_SECONDS)[0] else b""
            if not found:
                self._store.send_signal(signal.SIGKILL)
                raise StandbyLost(f"no store was started; see {self._log}")
            self._store_port = int(found)
        return self._store_port

    def store_ended(self) -> int | None:
        """The exit code of the process that hosts the store; None: it lives, or there is none."""
        return None if self._store is None else self._store.poll()

    def fork(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        output: BinaryIO,
        files: Mapping[str, int],
        run: str = "worker",
    ) -> ForkedProcess:
        """Start a worker.

        Args:
            argv: of ``python -m trainer``.
            env: all of its variables.
            output: its stdout and stderr.
            files: descriptors that it is given, by the variable that holds the path of each.
            run: which of the server's programs.

        Raises:
            StandbyLost: it was not started.
        """
        request = {"run": run, "argv": list(argv), "env": dict(env), "files": list(files)}
        self._send(request, [output.fileno(), *files.values()])
        until = time.monotonic() + _FORK_SECONDS
        while not self._pids:
            if not self.is_alive or time.monotonic() > until:
                self._end_server()
                raise StandbyLost(f"no worker was forked; see {self._log}")
            self.listen(1.0)
        pid = self._pids.pop()
        self._forked[pid] = process = ForkedProcess(self, pid)
        return process

    def forget(self, processes: Sequence[ForkedProcess]) -> None:
        """Let go of workers that have ended: from here on their pids may be anyone's."""
        gone = [self._forked.pop(process.pid) for process in processes if process.pid in self._forked]
        for process in gone:
            process.close()
            self._exits.pop(process.pid, None)
        if self.is_alive and gone:
            with contextlib.suppress(StandbyLost):
                self._send({"reap": [process.pid for process in gone]}, [])

    def exit_of(self, pid: int) -> int | None:
        """The exit code of a worker, None if it is not known to have ended."""
        self.listen(0)
        return self._exits.get(pid)

    def listen(self, seconds: float) -> None:
        """Take in what the server says, for as long as there is nothing."""
        if not self.is_alive or not select.select([self._channel], [], [], seconds)[0]:
            return
        with contextlib.suppress(BlockingIOError):
            while self.is_alive:
                try:
                    data = self._channel.recv(MAX_MESSAGE)
                except ConnectionResetError:
                    data = b""
                if data:
                    self._hear(json.loads(data))
                else:
                    self.is_alive = False

    def _hear(self, message: Mapping[str, Any]) -> None:
        if "pid" in message:
            self._pids.append(message["pid"])
        elif "exit" in message:
            self._exits[message["exit"]] = message["code"]
        else:
            self._ready = message["ready"]
            if not self._ready:
                self._say(f"Workers are started without a standby: {message['why']}.")

    def _send(self, message: Mapping[str, Any], files: Sequence[int]) -> None:
        try:
            socket.send_fds(self._channel, [json.dumps(message).encode()], files)
        except OSError as error:
            raise StandbyLost(f"no worker was forked: {error.strerror}") from error

    def _end_server(self) -> None:
        self.is_alive = False
        self._channel.close()
        self._server.kill()
        self._server.wait()

    def close(self) -> None:
        """End the server; workers that still live die with it."""
        if not self._ready:  # it still imports, and would not look at its channel before the end of that
            self._end_server()
            return
        self._channel.close()
        self.is_alive = False
        try:
            self._server.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._end_server()

    def __enter__(self) -> Standby:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
