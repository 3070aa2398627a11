"""Hosts on one machine: network namespaces with an address and a name each, joined by a switch of their own.

What a namespace does not separate: disks (here the file system that nodes share), memory and cores. Needs root,
and iproute2.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_numbers = itertools.count()


def need(*commands: str) -> None:
    """Skip the test where it cannot be run, and fail where it has to be (MUSTER_REQUIRE_CLUSTER)."""
    missing = [command for command in commands if shutil.which(command) is None]
    reason = f"needs {', '.join(missing)} (make cluster-tools)" if missing else ""
    if os.geteuid() != 0:
        reason = "needs root, to make network namespaces and to start daemons"
    elif not missing and subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        reason = "needs the right to make network namespaces"
    if reason and os.environ.get("MUSTER_REQUIRE_CLUSTER"):
        pytest.fail(f"MUSTER_REQUIRE_CLUSTER is set, but this test {reason}")
    if reason:
        pytest.skip(reason)


@dataclass(frozen=True)
class Host:
    """One of them. Every host knows every other's name."""

    name: str
    address: str
    namespace: str

    def command(self, *argv: str) -> list[str]:
        """The command that runs a command there; its process id is that of the command."""
        inside = ["sh", "-c", 'hostname "$0" && exec "$@"', self.name, *argv]
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", *inside]

    def processes(self) -> list[int]:
        """The ids of the processes that run there."""
        done = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in done.stdout.split()]


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Hosts by name, gone at the end."""
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
            shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


def _write_names(host: Host, everyone: list[Host]) -> None:
    _etc(host).mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{other.address} {other.name}" for other in everyone)]
    (_etc(host) / "hosts").write_text("\n".join(lines) + "\n")


def _etc(host: Host) -> Path:
    """`ip netns exec` puts what lies in this folder in the place of the same names in /etc."""
    return Path("/etc/netns") / host.namespace


def _ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(args)}: {done.stderr}"


@contextmanager
def ssh_servers(members: list[Host], folder: Path) -> Iterator[Path]:
    """An sshd on every host, for root with a key of its own; gives the client's configuration file."""
    folder.mkdir(parents=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    server = folder / "sshd_config"
    server.write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nPasswordAuthentication no\nPidFile none\nMaxStartups 100\n"
    )
    client = folder / "ssh_config"
    client.write_text(
        f"Host *\n  IdentityFile {folder}/user_key\n  UserKnownHostsFile {folder}/known_hosts\n"
        "  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"
    )
    sshd = str(shutil.which("sshd"))
    for host in members:  # so that `ssh` needs no arguments there
        own = _etc(host) / "ssh"
        own.mkdir()
        shutil.copy(client, own / "ssh_config")
    servers = [subprocess.Popen(host.command(sshd, "-D", "-f", str(server))) for host in members]
    try:
        for host in members:
            _wait_for_port(host, 22)
        yield client
    finally:
        for process in servers:
            process.terminate()
        for process in servers:
            process.wait()


def _wait_for_port(host: Host, port: int) -> None:
    look = f"(exec 3<>/dev/tcp/{host.address}/{port}) 2>/dev/null && exit 0; sleep 0.05"
    done = subprocess.run(host.command("bash", "-c", f"for i in $(seq 200); do {look}; done; exit 1"))
    assert done.returncode == 0, f"nothing listens at {host.name}:{port}"
