"""``muster resume RUN_DIR [overrides]``: the next generation of a run's config, or a branch of the run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from rich.console import Console

from launch import ssh
from launch.cluster import Cluster
from launch.local import check_data, complete_config, run_here
from launch.nodes import on_nodes
from launch.outcome import EXIT_DONE, Outcome
from parallel.errors import ConfigError
from trainer import overrides as grammar
from trainer.compose import apply_overrides
from trainer.config import RunConfig
from trainer.environment import describe, differences
from trainer.rundir import RunDirectory

_WORLD = ("launcher.nnodes", "launcher.nproc_per_node")
_DP = (*_WORLD, *(f"parallel.{degree}" for degree in ("dp_replicate", "dp_shard", "cp", "tp", "pp")))
BLANKS: dict[str, tuple[str, ...]] = {
    "device": ("launcher.nproc_per_node",),
    "train.dtype": ("device",),
    "launcher.nnodes": ("launcher.hostfile",),
    "launcher.nproc_per_node": ("device", "launcher.hostfile"),
    "train.num_threads": ("launcher.nproc_per_node", "device"),
    "parallel.dp_shard": tuple(name for name in (*_DP, "device") if name != "parallel.dp_shard"),
    "train.micro_batch": (*_DP, "device", "train.global_batch"),
    "data.virtual_shards": ("train.global_batch",),
    "layout.expert_ffn_dim": ("model.ffn_dim", "layout.granularity"),
    "model.head_dim": ("model.dim", "model.num_heads"),
    "model.vocab_size": ("data.tokenizer.path", "data.tokenizer.vocab_size"),
}
"""Fields that ``resolve()`` fills → those it fills them from: when one changes, they are filled anew."""


def main(argv: list[str]) -> Outcome:
    """Run ``muster resume`` with these arguments.

    Raises:
        ConfigError: no run is there, or the overrides do not fit it.
    """
    if not argv:
        raise ConfigError("RUN_DIR", "", "which run?", "muster resume runs/NAME/ID")
    source = RunDirectory.open(Path(argv[0]))
    overrides = argv[1:]
    changed = {override.key_or_group for override in grammar.parse(overrides)}
    frozen = _at_its_place(source)
    asked = refill(apply_overrides(frozen, overrides), source.asked(), changed)
    console = Console(highlight=False)
    if ssh.is_starter(asked.launcher):
        place = [str(source.path), *overrides]
        return ssh.start_everywhere(asked.launcher, lambda fields: _remote_work(place, fields), console)
    if changed & {"run.id", "run.name", "run.root"}:
        return _branch(source, asked, changed, console)
    if source.is_finished(asked.train.steps):
        newest = source.newest_checkpoint()
        return Outcome(
            EXIT_DONE,
            f"This run is finished: its checkpoint is at step {newest} of train.steps={asked.train.steps}. "
            f"To train it longer:\n  muster resume {argv[0]} train.steps={2 * (newest or 1)}",
        )
    config = complete_config(asked)

    def go_on(cluster: Cluster | None) -> Outcome:
        check_data(config, console)
        with source.lock():
            source.freeze(config)
        _report_differences(source, config, console)
        return run_here(source, config, console, cluster)

    return on_nodes(asked, config, console, go_on)


def _remote_work(arguments: list[str], fields: dict[str, Any]) -> dict[str, Any]:
    given = [f"launcher.{name}={value}" for name, value in fields.items()]
    kept = [argument for argument in arguments if argument.partition("=")[0] not in _keys(fields)]
    return {"command": "resume", "arguments": [*kept, *given]}


def _keys(fields: dict[str, Any]) -> list[str]:
    return [f"launcher.{name}" for name in fields]


def _branch(source: RunDirectory, asked: RunConfig, changed: set[str], console: Console) -> Outcome:
    """A new run that starts from this one's newest checkpoint; the old run is left as it is."""
    if "checkpoint.load_from" not in changed:
        if source.newest_checkpoint() is None:
            raise ConfigError(
                "RUN_DIR", source.path, "has no checkpoint to branch from", "resume it in place"
            )
        asked.checkpoint.load_from = str(source.path)
    if "run.id" not in changed:
        asked.run.id = None
    config = complete_config(asked)

    def go_on(cluster: Cluster | None) -> Outcome:
        run = RunDirectory.create(config)
        if run.path == source.path:
            raise ConfigError(
                "run.id", config.run.id, "is this run itself", "leave it out, or give another id"
            )
        check_data(config, console)
        written = refill(asked, source.asked(), changed, everything=True)
        written.run.id = config.run.id
        run.freeze(config, written)
        console.print(f"Branch of {source.path}: {run.path}", markup=False, soft_wrap=True)
        return run_here(run, config, console, cluster)

    return on_nodes(asked, config, console, go_on)


def refill(
    config: RunConfig, asked: RunConfig | None, changed: set[str], everything: bool = False
) -> RunConfig:
    """A copy with those fields blank again that were left blank at first and follow from a changed one.

    Args:
        config: the frozen config with the overrides in it.
        asked: what the user had written at first; None (not kept): every such field counts as left blank.
        changed: dotted keys that this resume sets; they are never refilled.
        everything: blank again whatever was left blank at first, changed source or not.
    """
    c = copy.deepcopy(config)
    moved = set(changed)
    for key, sources in BLANKS.items():
        if key in changed or not (everything or moved.intersection(sources)):
            continue
        if asked is None or _get(asked, key) == _get(_DEFAULTS, key):
            _set(c, key, _get(_DEFAULTS, key))
            moved.add(key)
    return c


_DEFAULTS = RunConfig()


def _get(config: RunConfig, key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name)
    return node


def _set(config: RunConfig, key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    setattr(_get(config, section) if section else config, name, value)


def _at_its_place(run: RunDirectory) -> RunConfig:
    """The run's config, with run.* saying where the directory is now (it may have been moved)."""
    config = run.full_config()
    if RunDirectory.of(config).path != run.path:
        config.run.root = str(run.path.parent.parent)
        config.run.name, config.run.id = run.path.parent.name, run.path.name
    return config


def _report_differences(run: RunDirectory, config: RunConfig, console: Console) -> None:
    changes = differences(run.environment(), describe(config, []))
    if changes:
        console.print(
            f"Since this run was last started: {'; '.join(changes)}. It goes on, but not with the same bits.",
            markup=False,
            soft_wrap=True,
        )
