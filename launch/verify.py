"""``muster verify [overrides]``: proof that the asked layout computes what one process would.

reference   one process, three steps ──────────────────────────┐
layout      real workers: two steps, saved, ended              ├─▶ compared ─▶ certificate.json
            the same again: resumed from the checkpoint, one more ┘
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.agent import Agent
from launch.outcome import EXIT_DONE, EXIT_STOPPED, Outcome
from launch.workers import Plan, worker_command
from parallel.errors import ConfigError
from trainer.compose import absolute_paths, compose, write_atomically
from trainer.config import CallbackConfig, Device, Machine, RunConfig, parallel_dims, resolve
from trainer.ds_config import unrepeated
from trainer.environment import count_gpus, describe
from trainer.layout_rules import require_provable
from trainer.proof.compare import Check, Records, compare, first_failure
from trainer.proof.shrink import STEPS, Change, shrink
from trainer.rules import validate
from trainer.rundir import RunDirectory, choose_id

EXIT_NOT_EQUAL = 1
"""The layout does not compute what one process would."""

Command = Callable[[Path], list[str]]


def main(argv: list[str]) -> Outcome:
    """Run ``muster verify`` with these arguments.

    Raises:
        ConfigError: a mistake in the overrides, or no GPU where one is asked for.
    """
    device = Device.cpu
    overrides = list(argv)
    if "--device" in overrides:
        at = overrides.index("--device")
        name = overrides[at + 1] if at + 1 < len(overrides) else ""
        if name not in ("cpu", "cuda"):
            raise ConfigError("--device", name, "is cpu or cuda", "--device cpu")
        device = Device(name)
        del overrides[at : at + 2]
    asked = resolve(absolute_paths(compose(overrides)), Machine.here(count_gpus()))
    validate(asked)
    require_provable(asked, parallel_dims(asked))
    return verify(asked, Console(highlight=False), device)


def verify(
    asked: RunConfig, console: Console, device: Device = Device.cpu, command: Command = worker_command
) -> Outcome:
    """Prove a resolved config and write its certificate.

    Args:
        asked: resolved and validated.
        console: for the progress and the table.
        device: of the layout's ranks.
        command: of a worker, given its config.

    Raises:
        ConfigError: the shrunk config cannot run here.
    """
    began = time.time()
    config, run, changed = _prepare(asked, device)
    proof = Proof(config, run, command)
    try:
        with _phase(console, f"{parallel_dims(config)}, {config.layout.name}") as say:
            fault = proof.execute(say)
            say("comparing")
            checks = [] if fault is not None else proof.compare()
    finally:
        proof.end()
    first = first_failure(checks)
    passed = fault is None and first is None
    certificate = {
        "passed": passed,
        "time": began,
        "seconds": time.time() - began,
        "layout": str(parallel_dims(config)),
        "world_size": parallel_dims(config).world_size,
        "device": device.value,
        "fault": fault,
        "first_failure": None if first is None else first.plain(),
        "checks": [check.plain() for check in checks],
        "asked_and_run": [asdict(change) for change in changed],
        "environment": describe(config, sys.argv),
    }
    path = run.path / "certificate.json"
    write_atomically(path, json.dumps(certificate, indent=1, default=str) + "\n")
    _print(console, certificate, path)
    if passed:
        shutil.rmtree(proof.folder)
        return Outcome(EXIT_DONE)
    if fault is not None and fault["exit_code"] == EXIT_STOPPED:
        return Outcome(EXIT_STOPPED, "Stopped; nothing was proven.")
    return Outcome(EXIT_NOT_EQUAL, _verdict(certificate))


def _prepare(asked: RunConfig, device: Device) -> tuple[RunConfig, RunDirectory, list[Change]]:
    """The shrunk config, frozen in a run directory of its own."""
    identity = f"verify-{asked.run.id or choose_id()}"
    folder = Path(asked.run.root, asked.run.name, identity, "proof")
    recorder = CallbackConfig("trainer.proof.record:Recorder", {"folder": str(folder / "layout")})
    config, changed = shrink(asked, device, recorder)
    config.run.id, config.data.cache_dir = identity, str(folder / "cache")
    config.engine.ds_config = None
    validate(config)
    run = RunDirectory.create(config)
    for name in ("layout", "reference"):
        (folder / name).mkdir(parents=True)
    if asked.engine.ds_config is not None:
        # The user's file agrees with the fields that were asked for, not with their shrunk values.
        config.engine.ds_config = str(folder / "ds_config.json")
        write_atomically(Path(config.engine.ds_config), json.dumps(unrepeated(asked.engine.ds_config)))
    return config, run, changed


@dataclass
class Proof:
    """The processes of one proof.

    Attributes:
        folder: records of the layout's ranks and of the reference; kept if they disagree.
    """

    config: RunConfig
    run: RunDirectory
    command: Command

    def __post_init__(self) -> None:
        self.folder = self.run.path / "proof"
        self._reference: subprocess.Popen[str] | None = None

    def execute(self, say: Callable[[str], None]) -> dict[str, Any] | None:
        """Run everything. Returns why something did not run to its end, or None."""
        from trainer.data.prepare import prepare_data

        say("preparing")
        prepare_data(self.config)  # once, so that no process waits for another's lock
        self.run.freeze(self.config)
        self._reference = self._start_reference()
        for part, steps in (("the layout", STEPS - 1), ("the layout, resumed", STEPS)):
            say(part)
            self.config.train.steps = steps
            self.run.freeze(self.config)
            plan = Plan(
                command=self.command(self.run.config_path),
                num_workers=self.config.launcher.nproc_per_node,
                env={"OMP_NUM_THREADS": "1"},
            )
            agent = Agent(self.run, plan.starter(self.run.path), 0, 10.0, say=lambda line: None)
            outcome = agent.run()
            if outcome.code != EXIT_DONE:
                return {"part": part, "exit_code": outcome.code, "cause": outcome.message}
        say("the reference")
        output, _ = self._reference.communicate()
        if self._reference.returncode:
            return {"part": "the reference", "exit_code": self._reference.returncode, "cause": output}
        return None

    def _start_reference(self) -> subprocess.Popen[str]:
        own = self.run.path / "configs" / "0000.yaml"
        arguments = [str(own), str(self.folder / "reference"), str(os.getpid())]
        return subprocess.Popen(
            [sys.executable, "-m", "trainer.proof.reference", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def compare(self) -> list[Check]:
        """The certificate's checks."""
        return compare(Records(self.folder, self.run.path, self.config))

    def end(self) -> None:
        """Leave no process behind."""
        if self._reference is not None and self._reference.poll() is None:
            self._reference.kill()
            self._reference.wait()


@contextmanager
def _phase(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Shows which part is at work."""
    with console.status(f"Verifying {what}") as status:

        def say(part: str) -> None:
            if console.is_terminal:
                status.update(f"Verifying {what}: {part}")
            else:
                console.print(f"verify  {part}", markup=False)

        yield say


def _print(console: Console, certificate: dict[str, Any], path: Path) -> None:
    table = Table(title=f"{certificate['layout']} against one process, fp32", title_justify="left", box=None)
    for column in ("", "check", "worst", "allowed", "where"):
        table.add_column(column, justify="right" if column in ("worst", "allowed") else "left")
    for check in certificate["checks"]:
        allowed = f"{check['tolerance']:.0e}" if check["tolerance"] else "equal"
        mark = "[green]✓[/]" if check["passed"] else "[red]✗[/]"
        where = "" if check["passed"] and check["worst"] == 0 else check["where"]
        table.add_row(mark, check["name"], f"{float(check['worst']):.1e}", allowed, where)
    if certificate["checks"]:
        console.print(table)
    word = "passed" if certificate["passed"] else "FAILED"
    seconds = certificate["seconds"]
    console.print(f"{word} in {seconds:.0f} s: {path}", markup=False, soft_wrap=True)


def _verdict(certificate: dict[str, Any]) -> str:
    """The first thing that failed, and what it points at."""
    fault = certificate["fault"]
    if fault is not None:
        return f"Not verified: {fault['part']} did not run to its end: {fault['cause']}"
    check = certificate["first_failure"]
    suspicion = f" Suspicion: {check['suspicion']}." if check["suspicion"] else ""
    return f"Not equal: {check['name']} at {check['where']}.{suspicion}"
