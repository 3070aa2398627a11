"""Which node this is, and what follows from it: node 0 leads a run, the others work for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from rich.console import Console

from launch.charge import Deposed
from launch.cluster import Cluster, lead
from launch.control import Hello
from launch.follower import follow
from launch.outcome import EXIT_GAVE_UP, Outcome
from launch.succession import find_leader
from parallel.errors import ConfigError
from trainer.compose import plain
from trainer.config import RunConfig, require
from trainer.config_launcher import num_hosts
from trainer.environment import fingerprint
from trainer.network import address_towards, is_local, serve


def on_nodes(
    asked: RunConfig, config: RunConfig, console: Console, work: Callable[[Cluster | None], Outcome]
) -> Outcome:
    """Do ``work`` on node 0, with the cluster if there is one; on another node, follow node 0.

    Afterwards neither config says which node this is: they are for the run directory.

    Args:
        asked: as the user wrote it.
        config: the same, resolved on this node.

    Raises:
        ConfigError: the launcher's fields do not fit, a node cannot be reached, or the nodes are not alike.
    """
    if num_hosts(config.launcher) == 1:
        return work(None)
    _check(config)
    _import_quiet_torch()
    node_rank = config.launcher.node_rank
    leads = node_rank == 0 or (node_rank is None and is_local(str(config.launcher.master_addr)))
    config.launcher.node_rank = asked.launcher.node_rank = None
    prints = fingerprint()
    launcher = config.launcher
    given = (str(launcher.master_addr), launcher.master_port)
    leader = find_leader(config)
    leads = leads and leader is None
    own_store, place = None, given
    if not leads:
        own_store = serve("0.0.0.0", 0, "launcher.master_port")
        towards = given[0] if leader is None else leader.address
        place = (address_towards(towards) or towards, own_store.port)
    mine = Hello(
        host=prints["host"],
        node_rank=0 if leads else node_rank,
        num_workers=config.launcher.nproc_per_node,
        device=config.device.value,
        fingerprint=prints,
        asked=flat(plain(asked)),
        address=place[0],
        port=place[1],
    )
    try:
        if own_store is not None:
            return follow(config, mine, console, own_store, leader)
        with lead(config, mine, lambda line: console.print(line, markup=False, soft_wrap=True)) as cluster:
            cluster.outcome = work(cluster)
            return cluster.outcome
    except Deposed as lost:
        return Outcome(EXIT_GAVE_UP, f"This node does not lead any more and ends: {lost}.")


def _import_quiet_torch() -> None:
    """Without C++ warnings in this process: a name that does not resolve backwards, or a peer that has gone, is
    no news for a user, and is told with a stack. Workers are not meant: their warnings go to their logs."""
    variable = "TORCH_CPP_LOG_LEVEL"
    if variable not in os.environ:
        os.environ[variable] = "ERROR"  # read once, when the library is loaded
        import torch  # noqa: F401

        del os.environ[variable]


def _check(config: RunConfig) -> None:
    launcher = config.launcher
    if launcher.master_addr is None:
        raise ConfigError(
            "launcher.master_addr",
            None,
            f"launcher.nnodes={launcher.nnodes} nodes find each other at node 0",
            "launcher.master_addr=HOST of node 0, the same on every node",
        )
    rank, hosts = launcher.node_rank, num_hosts(launcher)
    require(
        rank is None or 0 <= rank < hosts,
        "launcher.node_rank",
        rank,
        f"is at least 0 and below launcher.nnodes + launcher.spares = {hosts}",
        f"launcher.node_rank={hosts - 1}",
    )
    require(
        0 < launcher.master_port < 65536,
        "launcher.master_port",
        launcher.master_port,
        "is a TCP port",
        "launcher.master_port=29400",
    )
    if rank == 0 and not is_local(launcher.master_addr):
        raise ConfigError(
            "launcher.master_addr",
            launcher.master_addr,
            f"is no address of this host ({fingerprint()['host']}), which is node 0",
            "launcher.master_addr=this host's name or address, the same on every node",
        )


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found
