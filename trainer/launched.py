"""How a rank learns its place, its config and its run directory from whoever launched it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from parallel.errors import ConfigError
from trainer.compose import absolute_paths, compose, load_frozen
from trainer.config import Machine, RunConfig, require, resolve
from trainer.config_launcher import num_nodes
from trainer.data.tokenizer import fill_vocabulary
from trainer.environment import check_alike, count_gpus, describe, fingerprint
from trainer.network import connect, serve, socket_interface
from trainer.rules import validate
from trainer.run import Place
from trainer.rundir import RunDirectory
from trainer.slurm import slurm_variables

_TIMEOUT = timedelta(minutes=10)
_HEARD_TIMEOUT = timedelta(seconds=30)


@dataclass(frozen=True)
class Arrival:
    """What a rank starts from. ``first_to_speak`` is true on one rank only: for what is said once."""

    config: RunConfig
    run_dir: Path
    place: Place
    first_to_speak: Callable[[], bool]


def arrive(argv: list[str], under_agent: bool) -> Arrival:
    """Find this rank's place and the run everyone trains.

    Args:
        argv: ``--config FILE`` from an agent; else a frozen YAML file or Hydra overrides.

    Raises:
        ConfigError: the config is wrong, there is no id that all launches of this run share, the first node
            cannot be reached, or the nodes are not alike.
    """
    # For everyone who looks there: libraries of the engines, and the plugins of users.
    os.environ.update(slurm_variables(os.environ))
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    store = _store(rank, world_size, under_agent)
    if under_agent:
        run_dir, generation = Path(os.environ["MUSTER_RUN_DIR"]), int(os.environ["MUSTER_GENERATION"])
        config = load_frozen(Path(argv[argv.index("--config") + 1]))
    else:
        told = _from_rank_0(argv, rank, local_rank, world_size, store)
        run_dir, generation = Path(told["run_dir"]), int(told["generation"])
        config = load_frozen(run_dir / "config.yaml")
    if num_nodes(config.launcher) > 1:
        os.environ.update(socket_interface(os.environ["MASTER_ADDR"]))
    place = Place(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        generation=generation,
        store=dist.PrefixStore(f"generation-{generation}", store),
        agent=under_agent,
    )
    return Arrival(config, run_dir, place, lambda: _is_first(store))


def _is_first(store: dist.Store) -> bool:
    try:
        return store.add("spoken", 1) == 1
    except RuntimeError:  # its host is gone, and was the one to speak
        return False


def _store(rank: int, world_size: int, under_agent: bool) -> dist.Store:
    """The rendezvous, under a prefix that no other generation of this job has used."""
    if world_size == 1 and not under_agent:
        return dist.HashStore()
    # torchelastic's own store outlives its workers and is handed to each generation as it is.
    hosted = under_agent or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    addr, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0 and not hosted:
        store = serve(addr, port, "MASTER_PORT")
    else:
        store = connect(addr, port, _TIMEOUT.total_seconds(), "MASTER_ADDR")
    store.set_timeout(_TIMEOUT)
    if under_agent:
        return dist.PrefixStore(f"launch-{os.environ['MUSTER_GENERATION']}", store)
    job, restart = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RUN_ID", "RESTART_COUNT"))
    return dist.PrefixStore(f"muster-{job}-{restart}", store)


def _from_rank_0(
    argv: list[str], rank: int, local_rank: int, world_size: int, store: dist.Store
) -> dict[str, str]:
    """Rank 0's run directory and generation, or its error, on every rank."""
    store.set(f"here-{rank}", json.dumps(None if local_rank else fingerprint()))
    if rank == 0:
        try:
            nodes = _nodes(world_size, store)
            run, generation = _open_run(argv, world_size, nodes)
            told = {"run_dir": str(run.path), "generation": str(generation)}
        except ConfigError as error:
            failed = [error.field, str(error.value), error.relation, error.fix]
            store.set("run", json.dumps({"error": failed}))
            _wait_until_heard(store, world_size)
            raise
        store.set("run", json.dumps(told))
        return told
    told = json.loads(store.get("run"))
    store.set(f"heard-{rank}", "")
    if "error" in told:
        raise ConfigError(*told["error"])
    return told


def _nodes(world_size: int, store: dist.Store) -> int:
    """How many nodes the ranks are on; not every launcher says so.

    Raises:
        ConfigError: they are not alike, or run unequal numbers of ranks.
    """
    keys = [f"here-{rank}" for rank in range(world_size)]
    store.wait(keys)
    nodes = [found for text in store.multi_get(keys) if (found := json.loads(text)) is not None]
    check_alike(nodes)
    require(
        world_size % len(nodes) == 0,
        "launcher.nproc_per_node",
        f"{world_size}/{len(nodes)}",
        f"every node runs the same number of processes, and {world_size} are on {len(nodes)} nodes",
        f"launch {-(-world_size // len(nodes))} on each",
    )
    return len(nodes)


def _wait_until_heard(store: dist.Store, world_size: int) -> None:
    """The store may live in this process: it must not end before the others have the error from it."""
    with suppress(RuntimeError):
        store.wait([f"heard-{rank}" for rank in range(1, world_size)], _HEARD_TIMEOUT)


def _open_run(argv: list[str], world_size: int, nodes: int) -> tuple[RunDirectory, int]:
    """Rank 0: compose or read the config, fit it to the launched world, freeze it in its run directory."""
    if len(argv) == 1 and argv[0].endswith((".yaml", ".yml")) and "=" not in argv[0]:
        asked = load_frozen(Path(argv[0]))
    else:
        asked = compose(argv)
    asked.launcher.nnodes, asked.launcher.num_nodes = nodes, -1
    asked.launcher.nproc_per_node = world_size // nodes
    config = resolve(absolute_paths(asked), Machine.here(count_gpus()))
    validate(config)
    fill_vocabulary(config)
    if config.run.id is None:
        config.run.id = _job_id()
    run = RunDirectory.claim(config)
    # A restart or a requeued job comes with the same config: then there is no new generation of it.
    if not run.config_path.is_file() or run.config() != absolute_paths(config):
        run.freeze(config, asked)
    run.write_environment(describe(config, ["python", "-m", "trainer", *argv]))
    return run, run.next_generation()


def _job_id() -> str:
    """An id that every launch of this job shares."""
    rendezvous = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    found = os.environ.get("SLURM_JOB_ID") or (rendezvous if rendezvous != "none" else None)
    if found is None:
        raise ConfigError(
            "run.id",
            None,
            "without `muster` a run is named by you or by a job id (SLURM_JOB_ID, torchrun --rdzv-id), so "
            "that a restart finds its directory",
            "run.id=my-run",
        )
    return found
