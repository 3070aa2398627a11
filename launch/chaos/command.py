"""``muster chaos [overrides]``: the same training twice, once in peace and once under faults; verdict.json.

::

    undisturbed  muster train ──────────────────────────────────▶ done ┐
    disturbed    muster train ─✗─ … ─✗─▶ 75, 70, killed                ├─▶ verdict
                 muster resume ─────✗─▶ …  ─────────────────────▶ done ┘

The agent answers most faults by itself. Where a fault ends the command, as a preemption does, it is started again:
by an operator or a scheduler in life, here by this.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.chaos.commands import Commands
from launch.chaos.draw import num_gone, plan
from launch.chaos.hosts import Host, hosts
from launch.chaos.verdict import judge, read_marks, show
from launch.local import complete_config
from launch.nodes import flat
from launch.outcome import EXIT_DONE, Outcome
from parallel.errors import ConfigError
from trainer import overrides as grammar
from trainer.compose import absolute_paths, compose, write_atomically
from trainer.config import RunConfig, world_size
from trainer.faults import FOLDER, SCHEDULE_FILE, SCHEDULE_VARIABLE
from trainer.faults.kinds import KINDS, Fault, read_schedule, write_schedule
from trainer.rundir import RunDirectory

EXIT_NOT_SURVIVED = 1
"""A fault was not survived, did not strike, or changed the result."""

_TAIL_LINES = 12
_OWN = ("run", "chaos", "cluster", "logger", "launcher", "resilience", "guard")
"""Sections in which a reference may differ: they do not touch what is computed."""


def main(argv: list[str]) -> Outcome:
    """Run ``muster chaos`` with these arguments.

    Raises:
        ConfigError: a mistake in the overrides or in the schedule.
    """
    console = Console(highlight=False)
    asked = compose(argv)
    nodes = _checked_nodes(asked)
    config = complete_config(compose([*argv, *places(nodes, str(len(nodes)))]) if nodes else asked)
    faults = plan(config)
    run = RunDirectory.claim(config) if config.run.resume else RunDirectory.create(config)
    overrides = [
        line for line in argv if grammar.parse([line])[0].key_or_group not in ("run.id", "run.resume")
    ]
    with ExitStack() as stack:
        made = stack.enter_context(hosts(*nodes)) if nodes else []
        chaos = Chaos(config, run, faults, overrides, console, made)
        stack.callback(chaos.commands.end)
        reference = chaos.reference()
        finished = chaos.disturb()
    verdict = {"time": chaos.began, "seconds": time.time() - chaos.began, "command": argv}
    verdict |= judge(faults, run.path / FOLDER, run.path, reference, finished)
    verdict["commands"] = chaos.num_commands
    path = run.path / "verdict.json"
    write_atomically(path, json.dumps(verdict, indent=1) + "\n")
    show(verdict, console)
    console.print(f"verdict        {path}", markup=False, soft_wrap=True)
    if verdict["equal"] and verdict["survived"] == verdict["planned"]:
        return Outcome(EXIT_DONE)
    return Outcome(EXIT_NOT_SURVIVED, _why(verdict, chaos))


def _why(verdict: dict[str, Any], chaos: Chaos) -> str:
    if not verdict["finished"]:
        return f"Not survived. The end of {chaos.log}:\n{chaos.tail()}"
    if not verdict["equal"]:
        return f"Not {'equal' if verdict['tolerance'] else 'identical'}: {verdict['first_difference']}"
    missing = verdict["planned"] - verdict["injected"]
    return f"Survived and equal, but {missing} of {verdict['planned']} faults never struck."


class Chaos:
    """The commands of one ``muster chaos``.

    Args:
        run: of the disturbed training.
        overrides: of both trainings.
        made: the nodes of the disturbed one; none: this machine.

    Attributes:
        commands: of the disturbed training.
        num_commands: how often it was started.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDirectory,
        faults: Sequence[Fault],
        overrides: Sequence[str],
        console: Console,
        made: Sequence[Host],
    ) -> None:
        self.config, self.run, self.faults, self._console = config, run, faults, console
        # The rate is compressed: what is a week's failures must not pass for a run that dies again and again.
        restarts = max(config.resilience.max_restarts, len(faults))
        self._overrides = [*overrides, f"resilience.max_restarts={restarts}", "logger.terminal=plain"]
        if not any(line.startswith("guard") for line in overrides):
            # Every flipped bit must be found, not one of many; and the same rank may be struck again and again.
            self._overrides += ["guard.digest_every=1", f"guard.max_rollbacks={restarts}"]
        self.folder = run.path / FOLDER
        self.log = self.folder / "commands.log"
        self.began = time.time()
        self.commands = Commands(self.log, made)
        self.num_commands = 0
        self._keep_schedule()

    def _keep_schedule(self) -> None:
        path = self.folder / SCHEDULE_FILE
        self.folder.mkdir(exist_ok=True)
        if path.is_file() and read_schedule(path) != list(self.faults):
            raise ConfigError(
                "run.resume",
                True,
                f"{path} has other faults than this command",
                "the same chaos.*, or a new run.id",
            )
        write_schedule(self.faults, path)
        marks = read_marks(self.folder)
        self._told = set(marks)
        lost = {marks[index]["host"] for index in marks if self.faults[index].kind == "node-gone"}
        self.commands.hosts = [host for host in self.commands.hosts if host.name not in lost]

    def reference(self) -> Path:
        """The directory of the undisturbed run; trains it if need be.

        Raises:
            ConfigError: it is not of this config, or cannot be trained.
        """
        given = self.config.chaos.reference
        if given is not None:
            reference = RunDirectory.open(Path(given))
            _check_reference(reference, self.config)
            return reference.path
        reference = RunDirectory(self.run.path.with_name(f"{self.run.path.name}-reference"))
        code = 0
        if not reference.is_finished(self.config.train.steps):
            self._say(f"undisturbed: {reference.path}")
            same = [f"run.id={reference.path.name}", "run.resume=true"]
            if self.commands.hosts:  # in one place it computes the same, and faster
                world = world_size(self.config)
                same += [
                    f"launcher.nproc_per_node={world}",
                    f"train.num_threads={self.config.train.num_threads}",
                ]
            here = Commands(self.log)
            try:
                code = here.run(["train", *self._overrides, *same], {}, lambda: None)
            finally:
                here.end()
        if code != EXIT_DONE:
            raise ConfigError(
                "chaos",
                reference.path,
                f"the undisturbed run ended with exit code {code}:\n{self.tail()}",
                "a config that trains",
            )
        return reference.path

    def disturb(self) -> bool:
        """Train under faults, to the end or to a fault that nothing answers. Returns whether it is finished."""
        self._say(f"disturbed by {len(self.faults)} fault(s): {self.run.path}")
        env = {SCHEDULE_VARIABLE: str(self.folder / SCHEDULE_FILE)}
        own = [f"run.id={self.run.path.name}", "run.resume=true"]
        arguments = ["train", *self._overrides, *own]
        most, gone = self.config.chaos.nodes, num_gone(self.faults)
        nnodes = f"{most - gone}:{most}" if gone else f"{most}"
        while True:
            left = [host.name for host in self.commands.hosts]
            where = places(left, nnodes) if left else []
            before = set(read_marks(self.folder))
            self.num_commands += 1
            code = self.commands.run([*arguments, *where], env, self._tell)
            if code == EXIT_DONE:
                return True
            struck = [self.faults[index] for index in set(read_marks(self.folder)) - before]
            if not any(KINDS[fault.kind].ends for fault in struck):
                return False
            self._say(f"the command ended with {code}; started again")
            if self.run.config_path.is_file():
                arguments = ["resume", str(self.run.path)]

    def _tell(self) -> None:
        for index, mark in sorted(read_marks(self.folder).items()):
            if index not in self._told:
                self._told.add(index)
                fault = self.faults[index]
                if fault.kind in ("node-lost", "node-gone"):
                    host = next(host for host in self.commands.hosts if host.name == mark["host"])
                    (self.commands.replace if fault.kind == "node-lost" else self.commands.lose)(host)
                of = f" ({fault.component})" if fault.component else ""
                self._say(
                    f"{len(self._told)}/{len(self.faults)}  step {mark['step'] + 1}  rank {mark['rank']}  "
                    f"{fault.kind} at {fault.point}{of}"
                )

    def _say(self, line: str) -> None:
        self._console.print(f"chaos  {line}", markup=False, soft_wrap=True)

    def tail(self) -> str:
        """The last lines that the commands printed."""
        with suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        return ""


def places(names: Sequence[str], nnodes: str) -> list[str]:
    """Overrides that spread a training over the nodes that are there."""
    return [f"launcher.nnodes='{nnodes}'", f"launcher.master_addr={names[0]}"]


def _checked_nodes(asked: RunConfig) -> list[str]:
    """The names of ``chaos.nodes`` namespaces.

    Raises:
        ConfigError: this machine cannot have them, or the config has nodes of its own.
    """
    nodes = asked.chaos.nodes
    if asked.launcher.nnodes != 1:
        relation = "faults are injected on this machine"
        raise ConfigError(
            "launcher.nnodes", asked.launcher.nnodes, relation, "launcher.nnodes=1, chaos.nodes=2"
        )
    if nodes == 0:
        return []
    missing = [command for command in ("ip", "unshare") if shutil.which(command) is None]
    if nodes == 1 or os.geteuid() != 0 or missing:
        why = f"{missing[0]} is not there" if missing else f"{nodes} node(s) as user {os.geteuid()}"
        relation = f"nodes are network namespaces: two or more, as root, with iproute2; {why}"
        raise ConfigError("chaos.nodes", nodes, relation, "chaos.nodes=0")
    return [f"node-{index}" for index in range(nodes)]


def _check_reference(reference: RunDirectory, config: RunConfig) -> None:
    if not reference.is_finished(config.train.steps):
        raise ConfigError(
            "chaos.reference",
            reference.path,
            f"has not finished {config.train.steps} steps",
            "a finished run",
        )
    theirs, ours = (flat(asdict(absolute_paths(c))) for c in (reference.config(), config))
    for key in ours:
        if key.partition(".")[0] not in _OWN and key != "data.cache_dir" and theirs.get(key) != ours[key]:
            raise ConfigError(
                "chaos.reference",
                reference.path,
                f"was trained with {key}={theirs.get(key)}, this config has {ours[key]}",
                "a run of the same config",
            )
