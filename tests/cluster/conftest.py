"""Two hosts and their ssh servers, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.chaos.hosts import Host, hosts
from tests.cluster.hosts import need, ssh_servers
from tests.command import CALM

RUN = [*(override for override in CALM if not override.startswith("launcher.")), "checkpoint.every=4"]
"""As the ``calm`` fixture trains, on as many nodes as a test likes."""


@pytest.fixture(scope="session")
def nodes() -> Iterator[list[Host]]:
    need("ip", "unshare")
    with hosts("node-a", "node-b") as made:
        yield made


@pytest.fixture(scope="session")
def ssh_config(nodes: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    need("sshd", "ssh")
    with ssh_servers(nodes, tmp_path_factory.mktemp("ssh") / "servers") as client:
        yield client
