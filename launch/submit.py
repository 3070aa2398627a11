"""``muster submit launcher=slurm|kubernetes [--dry-run] [overrides]``: write a job and hand it to the scheduler.

The config is composed and checked where it is submitted, for the nodes that the job asks for. What is queued
does not change when a YAML file is edited later.
"""

from __future__ import annotations

import argparse
import copy
import glob
import shutil
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from launch import kubernetes, slurm
from launch.outcome import Outcome
from parallel.errors import ConfigError
from trainer.compose import absolute_paths, compose
from trainer.config import RunConfig, resolve
from trainer.launchers import SUBMITTED, node_of
from trainer.rules import validate
from trainer.rundir import RunDirectory, choose_id

_FLAGS = "--dry-run, --config-dir FOLDER, --output FILE"


def main(argv: list[str]) -> Outcome:
    """Run ``muster submit`` with these arguments.

    Raises:
        ConfigError: a mistake in the arguments or in the config, or the scheduler refused the job.
    """
    options, overrides = _arguments(argv)
    asked = compose(overrides, options.config_dir)
    launcher = asked.launcher.name
    if launcher not in SUBMITTED:
        raise ConfigError(
            "launcher",
            launcher,
            "`muster submit` writes jobs for slurm and kubernetes; on machines of your own, `muster train` runs",
            "launcher=slurm, launcher=kubernetes, or muster train",
        )
    console = Console(highlight=False, stderr=True)
    if launcher == "slurm":
        return _slurm(asked, options, console)
    return _kubernetes(asked, overrides, options, console)


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("muster submit", add_help=False, allow_abbrev=False)
    parser.error = _usage_error  # type: ignore[method-assign]
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--config-dir")
    parser.add_argument("--output", type=Path)
    options, overrides = parser.parse_known_args(argv)
    for word in overrides:
        if word.startswith("-"):
            raise ConfigError(word, "", "is no flag of `muster submit`", f"one of {_FLAGS}")
    return options, overrides


def _usage_error(message: str) -> NoReturn:
    raise ConfigError("arguments", "", message, _FLAGS)


def complete(asked: RunConfig) -> RunConfig:
    """Fill the blanks for the nodes that the job asks for, and check every rule. Pure.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    config = resolve(asked, node_of(asked.launcher))
    validate(config)
    return config


def _slurm(asked: RunConfig, options: argparse.Namespace, console: Console) -> Outcome:
    if options.output is not None:
        raise ConfigError("--output", options.output, "the script is in the run directory", "leave it out")
    config = complete(absolute_paths(asked))
    _report_absent(config, console)
    tokenizer = config.data.tokenizer.path
    if tokenizer is not None and Path(tokenizer).exists():
        from trainer.data.tokenizer import fill_vocabulary

        fill_vocabulary(config)
    if options.dry_run:
        config.run.id = config.run.id or choose_id()
        return Outcome(0, slurm.batch_script(config, RunDirectory.of(config).path).rstrip())
    slurm.require_sbatch()
    proven = _prove(config, console)
    if proven.code:
        return proven
    is_new = config.run.id is None or not RunDirectory.of(config).path.exists()
    run = RunDirectory.create(config)
    try:
        slurm.require_first(run)
        asked.run.id = config.run.id
        run.freeze(config, asked)
        return slurm.submit(run, config)
    except BaseException:
        if is_new:  # nobody has it in hand yet
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def _kubernetes(
    asked: RunConfig, overrides: list[str], options: argparse.Namespace, console: Console
) -> Outcome:
    if options.config_dir is not None:
        raise ConfigError(
            "--config-dir",
            options.config_dir,
            "the pods compose the config, from the files in their image",
            "put the folder into the image's conf/",
        )
    config = complete(asked)  # its paths are the pods'
    config.run.id = config.run.id or choose_id()
    text = kubernetes.manifest(config, overrides)
    if options.dry_run:
        return Outcome(0, text.rstrip())
    kubernetes.require_kubectl()
    proven = _prove(config, console)
    if proven.code:
        return proven
    path = options.output or Path(f"{kubernetes.object_name(config)}.yaml")
    return kubernetes.submit(path, text, config)


def _prove(config: RunConfig, console: Console) -> Outcome:
    """``train.verify_first``, before anything waits in a queue."""
    if not config.train.verify_first:
        return Outcome(0)
    from launch.verify import verify

    here = copy.deepcopy(config)
    if here.launcher.name == "kubernetes":  # there run.root is a folder of the pods
        here.run.root = str(Path("runs").absolute())
    return verify(here, console)


def _report_absent(config: RunConfig, console: Console) -> None:
    """Say which input is not seen from here: a typo, or something that only the compute nodes have."""
    inputs = {
        "data.path": config.data.path,
        "data.tokenizer.path": config.data.tokenizer.path,
        "checkpoint.load_from": config.checkpoint.load_from,
    }
    for name, path in inputs.items():
        if path is None or "://" in path:
            continue
        if not Path(path).exists() and not glob.glob(path, recursive=True):  # noqa: PTH207 (absolute)
            console.print(
                f"{name}={path} is not seen from here; the nodes will need it.",
                markup=False,
                soft_wrap=True,
            )
