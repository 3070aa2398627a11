"""The commands that ``muster chaos`` runs: on this machine, or one on each of its namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch.chaos.hosts import Host

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0


class Commands:
    """Runs a ``muster`` command to its end, on every host at once.

    Args:
        log: what they print.
        hosts: where; none: here.

    Attributes:
        hosts: those that are not lost for good.
    """

    def __init__(self, log: Path, hosts: Sequence[Host] = ()) -> None:
        self.log, self.hosts = log, list(hosts)
        self._children: dict[Host | None, subprocess.Popen[bytes]] = {}
        self._arguments: Sequence[str] = ()
        self._env: Mapping[str, str] = {}

    def run(self, arguments: Sequence[str], env: Mapping[str, str], poll: Callable[[], None]) -> int:
        """Start ``muster ARGUMENTS`` and wait for its end.

        Args:
            env: variables beside this process's own.
            poll: called again and again meanwhile, and once at the end.

        Returns:
            The exit code; with hosts, the first that is not 0.
        """
        self._arguments, self._env = arguments, env
        for host in self.hosts or (None,):
            self._start(host)
        while any(child.poll() is None for child in self._children.values()):
            poll()
            for host, child in self._children.items():
                if host is not None and (child.poll() or 0) < 0:  # its agent was killed: as a launcher would
                    self._start(host)
            time.sleep(_POLL_SECONDS)
        poll()
        codes = [child.returncode for child in self._children.values()]
        return next((code for code in codes if code), 0)

    def _start(self, host: Host | None) -> None:
        command = [sys.executable, "-m", "launch.chaos.child", str(os.getpid()), *self._arguments]
        with self.log.open("ab") as output:
            self._children[host] = subprocess.Popen(
                command if host is None else host.command(*command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes here, and is passed on once
                env={**os.environ, **self._env},
            )

    def replace(self, host: Host) -> None:
        """A node is destroyed, with its memory, and a new one in its place runs the same command."""
        self._destroy(host)
        self._start(host)

    def lose(self, host: Host) -> None:
        """A node is destroyed, with its memory, for good."""
        self._destroy(host)
        self.hosts.remove(host)

    def _destroy(self, host: Host) -> None:
        host.destroy()
        self._children.pop(host).wait()

    def end(self) -> None:
        """Leave no process behind: what runs is asked to stop, then killed, and its workers with it."""
        alive = [child for child in self._children.values() if child.poll() is None]
        for child in alive:
            child.terminate()
        until = time.monotonic() + _GRACE_SECONDS
        for child in alive:
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
