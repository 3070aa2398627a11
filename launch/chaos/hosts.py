"""Hosts on one machine: network namespaces with an address and a name each, joined by a switch of their own.

Each has a memory mount of its own at /dev/shm, which is gone with the last of its processes. What a namespace does
not separate: disks (here the file system that nodes share), memory and cores. Needs root, and iproute2.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_numbers = itertools.count()


@dataclass(frozen=True)
class Host:
    """One of them. Every host knows every other's name."""

    name: str
    address: str
    namespace: str

    def command(self, *argv: str) -> list[str]:
        """The command that runs a command there; its process id is that of the command."""
        script = 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        inside = ["unshare", "--uts", "--mount", "sh", "-c", script, self.name, *argv]
        return ["ip", "netns", "exec", self.namespace, *inside]

    def processes(self) -> list[int]:
        """The ids of the processes that run there."""
        done = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in done.stdout.split()]

    def destroy(self) -> None:
        """Every process there is killed, and its memory goes with it."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Hosts by name, gone at the end. Raises OSError."""
    mark = f"mu{os.getpid()}x{next(_numbers)}"
    switch = f"{mark}-switch"
    made = [Host(name, f"10.77.0.{number}", f"{mark}-{name}") for number, name in enumerate(names, start=1)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, host in enumerate(made):
            port = f"port{number}"
            _write_names(host, made)
            _ip("netns", "add", host.namespace)
            inside = ("type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", switch, "link", "add", port, *inside)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.namespace, "link", "set", device, "up")
        yield made
    finally:
        for namespace in (*(host.namespace for host in made), switch):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)
            shutil.rmtree(etc(namespace), ignore_errors=True)


def _write_names(host: Host, everyone: list[Host]) -> None:
    folder = etc(host.namespace)
    folder.mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{other.address} {other.name}" for other in everyone)]
    (folder / "hosts").write_text("\n".join(lines) + "\n")


def etc(namespace: str) -> Path:
    """`ip netns exec` puts what lies in this folder in the place of the same names in /etc."""
    return Path("/etc/netns") / namespace


def _ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(args)}: {done.stderr.strip()}")
