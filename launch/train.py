"""``muster train``: compose and check, claim a run directory, freeze the config, train.

``@hydra.main`` lives here and only here, so that ``-m``, ``--cfg``, ``--info``, completion and sweeper
plugins work as in any Hydra program. Before it runs, the overrides go through :mod:`trainer.compose`,
which says what is wrong with them in one line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from launch import ssh, sweep
from launch.cluster import Cluster
from launch.local import check_data, complete_config, run_here
from launch.nodes import on_nodes
from launch.outcome import EXIT_DONE, Outcome
from parallel.errors import ConfigError
from trainer import overrides as grammar
from trainer.compose import CONF_DIR, CONFIG_NAME, absolute_paths, compose_raw, plain, to_run_config
from trainer.config import RunConfig, require
from trainer.launchers import SUBMITTED
from trainer.rundir import RunDirectory


def main(argv: list[str]) -> Outcome:
    """Run ``muster train`` with these arguments.

    Raises:
        ConfigError: a mistake in the arguments, or in the config that they compose.
    """
    flags, overrides, args = split_arguments(argv)
    if args.help or args.hydra_help or args.shell_completion:
        return _show_help([*overrides, *flags])
    config_dir = args.config_dir
    if args.multirun:
        plan = sweep.check(overrides, config_dir)
        try:
            _through_hydra([*plan.overrides, *flags], plan)
        except (SystemExit, KeyboardInterrupt):
            return plan.finish(Console(highlight=False), interrupted=True)
        return plan.finish(Console(highlight=False))
    (node, hydra_node), parsed = compose_raw(overrides, config_dir), grammar.parse(overrides)
    if args.cfg or args.info or _has_a_task(hydra_node) or any(o.is_hydra_override() for o in parsed):
        return _through_hydra([*(grammar.normalise(override) for override in parsed), *flags])
    return train(to_run_config(node))


def _has_a_task(node: DictConfig) -> bool:
    """Whether a config asks Hydra for more than to compose one run, which it would do twice again to be asked."""
    job = node.job
    logs = {node.runtime.choices[f"hydra/{name}_logging"] for name in ("job", "hydra")} != {"none"}
    return bool(
        node.mode is RunMode.MULTIRUN
        or node.callbacks
        or node.output_subdir
        or job.chdir
        or job.env_set
        or logs
    )


def split_arguments(argv: list[str]) -> tuple[list[str], list[str], argparse.Namespace]:
    """Hydra's flags, the overrides, and the flags as parsed. The two may come in any order.

    Raises:
        ConfigError: an unknown flag, or one that Muster has no use for.
    """
    parser = get_args_parser()
    parser.error = _usage_error  # type: ignore[method-assign,assignment]
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        grammar.parse(unknown)
        raise ConfigError(unknown[0], "", "is no flag of `muster train`", "muster train --help")
    for flag in ("config_name", "config_path", "experimental_rerun"):
        if getattr(args, flag) is not None:
            raise ConfigError(
                f"--{flag.replace('_', '-')}",
                getattr(args, flag),
                "there is one main config",
                "keep your own groups in a folder and give --config-dir=FOLDER experiment=NAME",
            )
    modes = [name for name in ("multirun", "cfg", "info", "run") if getattr(args, name)]
    if len(modes) > 1:
        raise ConfigError(
            f"--{modes[0]}", "", f"cannot be combined with --{modes[1]}", f"leave out --{modes[1]}"
        )
    flags = list(argv)
    for override in args.overrides:
        flags.remove(override)
    return flags, args.overrides, args


def _usage_error(message: str) -> None:
    raise ConfigError("arguments", "", message, "muster train --help")


def _through_hydra(arguments: list[str], plan: sweep.Sweep | None = None) -> Outcome:
    """Hand over to ``@hydra.main``; what it printed (help, --cfg) or trained is the outcome."""
    outcomes: list[Outcome] = []
    errors: list[Exception] = []

    @hydra.main(config_path=str(CONF_DIR), config_name=CONFIG_NAME, version_base="1.3")
    def task(node: DictConfig) -> float | None:
        job = HydraConfig.get()
        config = to_run_config(node)
        if job.mode is RunMode.MULTIRUN:
            assert plan is not None
            return plan.run_point(config, job.job.num, list(job.overrides.task), _train_point)
        try:
            outcomes.append(train(config))
        except Exception as error:  # past Hydra, which would announce it in words of its own
            errors.append(error)
        return None

    with _arguments(arguments):
        task()
    if errors:
        raise errors[0]
    return outcomes[0] if outcomes else Outcome(0)


def _train_point(asked: RunConfig) -> Outcome:
    if asked.launcher.nnodes != 1 and not ssh.is_starter(asked.launcher):
        raise ConfigError(
            "launcher.nnodes",
            asked.launcher.nnodes,
            "a sweep is one process that starts every point; agents started by hand on each node would each sweep",
            "launcher=ssh, or launcher.nnodes=1",
        )
    return train(asked)


def _show_help(arguments: list[str]) -> Outcome:
    try:
        return _through_hydra(arguments)
    except SystemExit as end:  # Hydra leaves after its help
        return Outcome(end.code if isinstance(end.code, int) else 0)


@contextmanager
def _arguments(arguments: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and lets exceptions through to us only with this variable set."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["muster train", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]


def train(asked: RunConfig) -> Outcome:
    """Train a composed config in a new run directory, or go on with it (``run.resume``).

    Raises:
        ConfigError: before anything was started.
    """
    console = Console(highlight=False)
    if ssh.is_starter(asked.launcher):
        values = plain(absolute_paths(asked))
        launcher = values["launcher"]
        return ssh.start_everywhere(
            asked.launcher,
            lambda fields: {"command": "train", "config": {**values, "launcher": {**launcher, **fields}}},
            console,
        )
    if asked.launcher.name in SUBMITTED and asked.launcher.node_rank is None:
        raise ConfigError(
            "launcher.name",
            asked.launcher.name,
            "is for `muster submit`; `muster train` would train on this machine",
            f"muster submit launcher={asked.launcher.name} …, or launcher=local",
        )
    config = complete_config(asked)
    if config.run.resume:
        require(
            config.run.id is not None,
            "run.resume",
            True,
            "goes on with the run of an id, and run.id is not given",
            "run.id=my-run",
        )
        run = RunDirectory.of(config)
        if run.config_path.is_file() and run.is_finished(config.train.steps):
            return Outcome(EXIT_DONE, f"This run is finished: {run.path}")
    return on_nodes(asked, config, console, lambda cluster: _train(asked, config, console, cluster))


def _train(asked: RunConfig, config: RunConfig, console: Console, cluster: Cluster | None) -> Outcome:
    if config.train.verify_first:
        from launch.verify import verify

        proven = verify(config, console)
        if proven.code:
            return proven
    run = RunDirectory.claim(config) if config.run.resume else RunDirectory.create(config)
    try:
        check_data(config, console)
    except BaseException:
        run.discard()
        raise
    asked.run.id = config.run.id
    if not run.config_path.is_file() or run.config() != absolute_paths(config):
        run.freeze(config, asked)
    return run_here(run, config, console, cluster)
