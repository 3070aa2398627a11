"""``launcher=ssh``: one command starts an agent on every host of a hostfile, and ends with node 0's exit code.

Each agent hangs on a leash: its standard input. What it is to do comes as the first line (so that no secret
stands in a command line); later lines are names of signals; the end of the file, which comes when this process
dies in whatever way, means SIGTERM. So no agent outlives its starter, and Ctrl-C here is a Ctrl-C everywhere.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.agent import StopRequest
from launch.outcome import EXIT_CONFIG, EXIT_DONE, EXIT_GAVE_UP, EXIT_STOPPED, Outcome
from parallel.errors import ConfigError
from trainer.config_launcher import LauncherConfig, num_hosts

_OPTIONS = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15"]
_FORWARDED = ("MUSTER_", "NCCL_", "GLOO_", "TORCH_", "HF_", "WANDB_", "PYTHONPATH")
_SSH_FAILED = 255
HERE = "muster-agent-is-here"
"""The first line that an agent prints: until then, what ends is ssh or the shell, and not the run."""
_POLL_SECONDS = 0.1
_AGAIN_SECONDS = 5.0
_END_SECONDS = 15.0

Payload = Callable[[dict[str, Any]], dict[str, Any]]
"""The launcher fields of a node → what :mod:`launch.remote` does there."""


@dataclass(frozen=True)
class Host:
    """A line of a hostfile. ``slots``: processes, where given."""

    name: str
    slots: int | None


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file with a line ``HOST [slots=PROCESSES]`` a node; ``#`` begins a comment.

    Raises:
        ConfigError: the file cannot be read, is empty or has a wrong line.
    """

    def wrong(what: str) -> ConfigError:
        return ConfigError("launcher.hostfile", path, what, "a line a node: HOST [slots=PROCESSES]")

    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise wrong(f"cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if len(words) > 2 or (len(words) == 2 and not (slots.isdigit() and int(slots) > 0)):
            raise wrong(f"line {number} is `{line.strip()}`")
        if words[0].startswith("-") or any(words[0] == host.name for host in hosts):
            raise wrong(
                f"line {number} names {words[0]}" + (" again" if not words[0].startswith("-") else "")
            )
        hosts.append(Host(words[0], int(slots) if slots else None))
    if not hosts:
        raise wrong("names no host")
    return hosts


def is_starter(launcher: LauncherConfig) -> bool:
    """Whether this process is to start the agents, rather than be one of them."""
    return launcher.name == "ssh" and launcher.node_rank is None


def start_everywhere(launcher: LauncherConfig, payload: Payload, console: Console) -> Outcome:
    """Run an agent on each host until the run has ended.

    Raises:
        ConfigError: the hostfile is wrong, or a host cannot be reached; the message names it.
    """
    hosts = read_hostfile(Path(str(launcher.hostfile)).expanduser())
    nnodes = len(hosts) - launcher.spares if launcher.nnodes == -1 else launcher.nnodes
    needed = num_hosts(replace(launcher, nnodes=nnodes))
    if needed > len(hosts):
        raise ConfigError(
            "launcher.nnodes",
            f"{nnodes} + {launcher.spares} spare(s)" if launcher.spares else nnodes,
            f"{launcher.hostfile} names {len(hosts)} host(s)",
            f"launcher.nnodes={len(hosts)}, or -1 for all of them",
        )
    hosts = hosts[:needed]
    fields: dict[str, Any] = {
        "nnodes": nnodes,
        "nproc_per_node": _processes(hosts, launcher),
        "master_addr": launcher.master_addr or hosts[0].name.rpartition("@")[2],
    }
    remotes = [
        Remote(host.name, launcher.ssh_args, payload({**fields, "node_rank": rank}), console, quiet=rank == 0)
        for rank, host in enumerate(hosts)
    ]
    try:
        return _Starter(remotes, console).run()
    finally:
        for remote in remotes:
            remote.let_go()
        for remote in remotes:
            remote.end()


def _processes(hosts: Sequence[Host], launcher: LauncherConfig) -> int:
    if launcher.nproc_per_node != -1:
        return launcher.nproc_per_node
    slots = {host.slots for host in hosts}
    if len(slots) > 1:
        told = ", ".join(f"{host.name}: {host.slots}" for host in hosts)
        raise ConfigError(
            "launcher.hostfile",
            launcher.hostfile,
            f"every node runs the same number of processes, and the slots differ ({told})",
            "equal slots, or launcher.nproc_per_node=N",
        )
    return slots.pop() or -1


@dataclass
class Remote:
    """The agent of one host, through its ssh process.

    Attributes:
        quiet: its lines are shown without its name.
        came: the agent itself has spoken, now or in an earlier attempt.
    """

    host: str
    ssh_args: Sequence[str]
    payload: dict[str, Any]
    console: Console
    quiet: bool
    process: subprocess.Popen[bytes] | None = None
    came: bool = False
    started: float = 0.0
    lines: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Log in and hand over the work."""
        command = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.quote(sys.executable)} -m launch.remote"
        self.started = time.monotonic()
        self.lines.clear()
        self.process = subprocess.Popen(
            ["ssh", *_OPTIONS, *self.ssh_args, self.host, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C reaches the starter alone
        )
        env = {key: value for key, value in os.environ.items() if key.startswith(_FORWARDED)}
        self._write(json.dumps({**self.payload, "env": env}))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _write(self, line: str) -> None:
        assert self.process is not None and self.process.stdin is not None
        with suppress(OSError):  # it has ended: poll() tells
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for raw in self.process.stdout:
            line = raw.decode(errors="replace").rstrip()
            if line == HERE:
                self.came = True
                continue
            self.lines = [*self.lines[-9:], line]
            self.console.print(
                line if self.quiet else f"[{self.host}] {line}", markup=False, highlight=False, soft_wrap=True
            )

    def code(self) -> int | None:
        """Its exit code, None while it lives."""
        assert self.process is not None
        code = self.process.poll()
        if code is not None:
            self._reader.join(1.0)
        return code

    def signal(self, name: str) -> None:
        """Have a signal delivered there."""
        self._write(name)

    def let_go(self) -> None:
        """End its input: the agent saves and leaves, if it has not yet."""
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()

    def end(self) -> None:
        """Let go, and see it end."""
        self.let_go()
        if self.process is not None:
            try:
                self.process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class _Starter:
    def __init__(self, remotes: list[Remote], console: Console) -> None:
        self._remotes, self._console, self._stop = remotes, console, StopRequest()
        self._told = self._told_now = False

    def run(self) -> Outcome:
        head, *others = self._remotes
        with self._stop.listening():
            for remote in self._remotes:
                remote.start()
            while head.code() is None:
                self._pass_on_signals()
                for remote in others:
                    code = remote.code()
                    if code not in (None, EXIT_DONE):
                        self._judge(remote, int(code or 0))
                time.sleep(_POLL_SECONDS)
            code = int(head.code() or 0)
            if not head.came:
                raise _unreachable(head, code)
            if code == _SSH_FAILED or code < 0:
                where = f"the connection to node 0 ({head.host}) was lost: {_last(head)}"
                return Outcome(EXIT_GAVE_UP, f"{where}. The nodes save and stop.")
        return Outcome(code)

    def _pass_on_signals(self) -> None:
        if self._stop.cause is not None and not self._told:
            self._told = True
            for remote in self._remotes:
                remote.signal("SIGTERM")
        if self._stop.now and not self._told_now:
            self._told_now = True
            for remote in self._remotes:
                remote.signal("SIGINT")

    def _judge(self, remote: Remote, code: int) -> None:
        """A node's command has ended before node 0's: it never was there, or is lost and to be started again."""
        if not remote.came:
            raise _unreachable(remote, code)
        if code in (EXIT_CONFIG, EXIT_STOPPED) or self._stop.cause is not None:
            return  # node 0 knows, and is about to end
        if time.monotonic() - remote.started > _AGAIN_SECONDS:
            self._console.print(
                f"[{remote.host}] ended with code {code}; starting it again", markup=False, soft_wrap=True
            )
            remote.end()
            remote.start()


def _unreachable(remote: Remote, code: int) -> ConfigError:
    what = "cannot be reached over ssh" if code == _SSH_FAILED else "cannot run Muster"
    return ConfigError(
        "launcher.hostfile",
        remote.host,
        f"this host {what}: {_last(remote)}",
        f"`ssh {' '.join([*remote.ssh_args, remote.host])} true` must work without a password, and this folder and "
        "Python must be at the same place there",
    )


def _last(remote: Remote) -> str:
    return next((line for line in reversed(remote.lines) if line.strip()), f"ssh ended with {remote.code()}")
