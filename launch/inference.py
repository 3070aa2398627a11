"""A checkpoint put to use on this machine: which one, in what layout, and the processes that hold it.

One process does the job itself. Several are workers like those of training, in a folder that is gone
afterwards; the experts are spread over ``parallel.ep`` of them and the rest of the weights over all.
"""

from __future__ import annotations

import copy
import difflib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.outcome import EXIT_GAVE_UP, Outcome
from parallel.errors import ConfigError
from trainer.config import Device, EngineConfig, ParallelConfig, RunConfig, require
from trainer.config_launcher import LauncherConfig

if TYPE_CHECKING:
    from trainer.checkpoint.resume import Checkpoint
    from trainer.inference import Job

_POLL_SECONDS = 0.05


class JobFailed(Exception):
    """The ranks did not do it. ``outcome`` is what to tell the user."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.message)
        self.outcome = outcome


def split(command: str, arguments: list[str], kinds: Mapping[str, type]) -> tuple[dict[str, Any], list[str]]:
    """The command's own options, as typed values, and the rest: overrides of the run's config.

    Values of options are taken as they are, spaces included. What has a dot in its name is an override.

    Raises:
        ConfigError: an unknown option, or a value of another type.
    """
    options: dict[str, Any] = {}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in kinds:
            options[key] = _typed(key, value, kinds[key])
        elif equals and ("." in key or key in ("device", "data")):
            overrides.append(argument)
        else:
            near = difflib.get_close_matches(key.lstrip("-"), kinds, n=1, cutoff=0.5)
            known = ", ".join(f"{name}=…" for name in kinds)
            fix = f"did you mean {near[0]}=…" if near else f"one of {known}, or a field: parallel.ep=2"
            raise ConfigError(key, value, f"is no option of `muster {command}`", fix)
    return options, overrides


def _typed(key: str, value: str, kind: type) -> Any:
    if kind is bool:
        names = {"true": True, "false": False}
        if value.lower() not in names:
            raise ConfigError(key, value, "is true or false", f"{key}=true")
        return names[value.lower()]
    try:
        return kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(key, value, f"must be {what}", f"{key}=1") from None


def find_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, or the newest valid one of a run, every byte of it verified.

    Raises:
        ConfigError: there is none; the message names the nearest run.
    """
    from trainer.rundir import RunDirectory

    if not (path / "manifest.json").is_file():
        path = RunDirectory.open(path).path
    from trainer.checkpoint.resume import open_checkpoint

    return open_checkpoint(path)


def layout_for(frozen: RunConfig, overrides: list[str]) -> RunConfig:
    """The run's config for one process, or as many as the overrides say; complete and checked.

    Raises:
        ConfigError: an override that cannot be, or more than one node.
    """
    from launch.local import complete_config
    from trainer.compose import apply_overrides
    from trainer.environment import count_gpus

    asked = copy.deepcopy(frozen)
    asked.engine, asked.parallel = EngineConfig(), ParallelConfig()
    asked.launcher, asked.callbacks = LauncherConfig(nproc_per_node=1), []
    asked.train.num_threads = -1
    if asked.device is Device.cuda:
        asked.device = Device.auto  # a run of GPUs can be read where there are none
    asked = apply_overrides(asked, overrides)
    launcher = asked.launcher
    require(
        launcher.nnodes == 1,
        "launcher.nnodes",
        launcher.nnodes,
        "a checkpoint is put to use by the processes of one node",
        "launcher.nproc_per_node=… alone",
    )
    if launcher.nproc_per_node == -1:
        launcher.nproc_per_node = max(1, count_gpus())
    # Nothing is trained: a batch is what the processes read at once.
    asked.train.global_batch = asked.train.micro_batch * launcher.nproc_per_node
    asked.data.virtual_shards = -1
    return complete_config(asked)


def perform(job: Job, config: RunConfig, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Do a job in the config's layout; its answers.

    Raises:
        ConfigError: an input that cannot work.
        JobFailed: a process failed.
    """
    if config.launcher.nproc_per_node == 1:
        from trainer.inference import run_alone

        return run_alone(job, config, checkpoint)
    from launch.local import worker_plan
    from trainer.compose import freeze
    from trainer.inference import ANSWERS
    from trainer.rundir import RunDirectory

    with tempfile.TemporaryDirectory(prefix="muster-job-") as name:
        folder = Path(name)
        freeze(config, folder / "config.yaml")
        job.save(folder)
        plan = worker_plan(RunDirectory(folder), config)
        _wait(replace(plan, command=[*plan.command, "--job"]), folder)
        answers: list[dict[str, Any]] = json.loads((folder / ANSWERS).read_text())
        return answers


def _wait(plan: Any, folder: Path) -> None:
    """Until every worker is done. Ctrl-C and SIGTERM are KeyboardInterrupts here, and no worker survives one."""
    from launch.failure import has_failed

    with plan.starter(folder)(0, False) as group:
        while None in (codes := group.codes()) and not has_failed(codes):
            time.sleep(_POLL_SECONDS)
        if not has_failed(codes):
            return
        until = time.monotonic() + group.settle_seconds
        while ((failure := group.failure()) is None or not failure.certain) and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            group.codes()
    assert failure is not None, "a worker has failed"
    if failure.exit_code == 2:
        raise JobFailed(Outcome(failure.exit_code, failure.cause))
    said = f"rank {failure.rank} failed: {failure.cause}\n{failure.evidence}"
    raise JobFailed(Outcome(EXIT_GAVE_UP, said))
