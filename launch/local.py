"""A run that this process leads: the store, the agent, the view, and what is written when it ends."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from launch.agent import Agent, Incomplete
from launch.cluster import Cluster
from launch.cluster_group import starter
from launch.outcome import EXIT_CONFIG, EXIT_GAVE_UP, EXIT_STOPPED, Outcome
from launch.standby import Standby, standby_for
from launch.view import RunView
from launch.workers import Plan, worker_command
from parallel.errors import ConfigError
from trainer.checkpoint.lease import kept, memory_folder
from trainer.compose import absolute_paths
from trainer.config import Device, Machine, RunConfig, resolve
from trainer.config_launcher import num_nodes
from trainer.environment import count_gpus, describe
from trainer.metrics.schema import EVENTS_FILE, METRICS_FILE
from trainer.network import socket_interface
from trainer.rules import validate
from trainer.rundir import RunDirectory


def complete_config(asked: RunConfig) -> RunConfig:
    """Fill the blanks for this machine and check every rule.

    Raises:
        ConfigError: the first rule that does not hold, what this machine has not got included.
    """
    num_gpus = count_gpus()
    if asked.device is Device.cuda and num_gpus == 0:
        raise ConfigError(
            "device",
            "cuda",
            "takes a GPU, and this machine has none that torch can use",
            "device=cpu, or device=auto",
        )
    config = resolve(absolute_paths(asked), Machine.here(num_gpus))
    launcher = config.launcher
    if config.device is Device.cuda and num_gpus < launcher.nproc_per_node:
        fix = f"launcher.nproc_per_node={num_gpus}" if num_gpus else "device=cpu"
        raise ConfigError(
            "device",
            "cuda",
            f"takes launcher.nproc_per_node={launcher.nproc_per_node} GPUs; this machine has {num_gpus}",
            fix,
        )
    validate(config)
    if config.data.tokenizer.path is not None:
        from trainer.data.tokenizer import fill_vocabulary

        fill_vocabulary(config)
    return config


def check_data(config: RunConfig, console: Console) -> None:
    """Prepare the data once, before any worker starts, so that what is wrong with it is said once.

    Raises:
        ConfigError: the data cannot be used.
    """
    with console.status("Preparing data…"):
        from trainer.data.prepare import prepare_data

        prepare_data(config)


def worker_plan(
    run: RunDirectory, config: RunConfig, node_rank: int = 0, port: int = 0, leader: str = ""
) -> Plan:
    """What a node starts.

    Args:
        port: of the store of several nodes.
        leader: address of node 0, which hosts it.
    """
    launcher, nodes = config.launcher, num_nodes(config.launcher)
    env = {"OMP_NUM_THREADS": str(config.train.num_threads)}
    host = "127.0.0.1"
    if nodes > 1:
        host = leader
        env |= socket_interface(host)
    return Plan(
        command=worker_command(run.config_path),
        num_workers=launcher.nproc_per_node,
        env=env,
        master_addr=host,
        master_port=port,
        heartbeat_seconds=config.resilience.heartbeat_seconds,
        first_rank=node_rank * launcher.nproc_per_node,
        world_size=nodes * launcher.nproc_per_node,
    )


def run_here(
    run: RunDirectory,
    config: RunConfig,
    console: Console,
    cluster: Cluster | None,
    standby: Standby | None = None,
) -> Outcome:
    """Train the frozen run to its end under an agent, then write the report and the summary.

    Args:
        cluster: the run's nodes; None: this one alone.
        standby: of this node, where there is one already; it is left as it is.

    Raises:
        ConfigError: a node cannot work.
    """
    inherited = cluster is not None and cluster.inheritance is not None
    patience = config.resilience.node_timeout_seconds if inherited else None
    with run.lock(patience), ExitStack() as stack:
        if standby is None:
            standby = standby_for(
                config, run.path, lambda line: console.print(line, markup=False, soft_wrap=True)
            )
            if standby is not None:
                stack.enter_context(standby)
        with console.status("Starting…"):
            run.write_environment(describe(config, sys.argv))
            leader, port = "", 0
            if cluster is not None:
                leader, port = cluster.address
                cluster.begin(run, config)
        if cluster is not None:
            try:
                cluster.prepare(run.path)
            except Incomplete:
                return Outcome(EXIT_STOPPED, f"Stopped before the start ({cluster.asked_to_stop()}).")
        with RunView(run.path, config, console) as view:
            resilience = config.resilience

            def plan(layout: RunConfig) -> Plan:
                return replace(worker_plan(run, layout, 0, port, leader), standby=standby)

            start = plan(config).starter(run.path) if cluster is None else starter(cluster, plan, run.path)
            agent = Agent(
                run,
                start,
                resilience.max_restarts,
                resilience.stop_grace_seconds,
                say=view.say,
                blame=cluster.blame if cluster is not None else lambda failure: None,
            )
            if cluster is not None:
                cluster.stopped = lambda: agent.stop.cause is not None
            outcome = tell_of_snapshots(agent.run(), config.checkpoint.memory_dir, run.path)
        if outcome.code != EXIT_CONFIG:
            summarise(run.path, console, config.logger.report)
    return outcome


def tell_of_snapshots(outcome: Outcome, memory_dir: str | None, run_dir: Path) -> Outcome:
    """Of a run that gave up: what it keeps in memory for a restart, and who frees that."""
    found = kept(memory_folder(memory_dir, run_dir)) if outcome.code == EXIT_GAVE_UP else None
    if found is None:
        return outcome
    line = f"  its snapshots take {found}; the next start of another run on this machine frees that"
    return Outcome(outcome.code, f"{outcome.message}\n{line}")


def summarise(run_dir: Path, console: Console, report: bool) -> None:
    """Write report.html, if that is asked for, and print the summary. A run that logged nothing has none."""
    if not (run_dir / EVENTS_FILE).is_file() and not (run_dir / METRICS_FILE).is_file():
        return
    try:
        from trainer.metrics.summary import final_summary

        if report:
            from trainer.metrics.report import write_report

            write_report(run_dir)
        final_summary(console, run_dir)
    except Exception as error:
        # The training is done and saved: a plot that fails must not change the exit code.
        console.print(
            f"report: {type(error).__name__}: {error}. Again with: muster report {run_dir}", markup=False
        )
