"""What tests of several hosts need beside the hosts themselves: the right to make them, and ssh servers on them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from launch.chaos.hosts import Host, etc


def cannot_run(reason: str) -> NoReturn:
    """Skip the test, or fail it where it has to be run (``MUSTER_REQUIRE_CLUSTER=1``)."""
    if os.environ.get("MUSTER_REQUIRE_CLUSTER") == "1":
        pytest.fail(f"MUSTER_REQUIRE_CLUSTER is set, but this test {reason}")
    pytest.skip(reason)


def need(*commands: str) -> None:
    """Commands, root and network namespaces, or the test cannot be run."""
    missing = [command for command in commands if shutil.which(command) is None]
    reason = f"needs {', '.join(missing)} (make cluster-tools)" if missing else ""
    if os.geteuid() != 0:
        reason = "needs root, to make network namespaces and to start daemons"
    elif not missing and subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        reason = "needs the right to make network namespaces"
    if reason:
        cannot_run(reason)


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
        own = etc(host.namespace) / "ssh"
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
