"""Two hosts, their ssh servers, and what one node computes: shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, hosts, need, ssh_servers
from tests.command import Workplace

RUN = ["parallel.ep=2", "optim.schedule=constant", "train.steps=12", "checkpoint.every=4"]


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


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The same run on one node."""
    workplace = Workplace(tmp_path_factory.mktemp("one-node"))
    workplace.train(*RUN, "launcher.nproc_per_node=2")
    return workplace
