"""The directory of one run: how it is named, claimed, frozen and found again (docs: a run directory)."""

from __future__ import annotations

import difflib
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from parallel.errors import ConfigError
from trainer.compose import CONF_DIR, freeze, load_frozen, write_atomically
from trainer.config import RunConfig
from trainer.metrics.jsonl import read_events
from trainer.metrics.schema import EVENTS_FILE, METRICS_FILE

_STEP = re.compile(r"step-(\d{8,})")
_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"  # no letters that look like digits
_TAIL_BYTES = 1 << 16


def choose_id() -> str:
    """A new run id, sortable by time: ``20261121-213045-x7``."""
    return time.strftime("%Y%m%d-%H%M%S-") + "".join(secrets.choice(_ALPHABET) for _ in range(2))


class RunDirectory:
    """``runs/<name>/<id>/``, by its path."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @classmethod
    def of(cls, config: RunConfig) -> RunDirectory:
        """The directory that a config with an id names; it need not exist."""
        run = config.run
        return cls(Path(run.root).expanduser() / run.name / str(run.id))

    @classmethod
    def create(cls, config: RunConfig) -> RunDirectory:
        """Claim the directory of a new run.

        Raises:
            ConfigError: the directory cannot be written, or holds a run with checkpoints.
        """
        run = cls.claim(config)
        if run.newest_checkpoint() is not None:
            raise ConfigError(
                "run.id",
                config.run.id,
                f"{run.path} holds a run with checkpoints",
                f"`muster resume {run.path}`, or another id",
            )
        return run

    @classmethod
    def claim(cls, config: RunConfig) -> RunDirectory:
        """Make the directory if needed, prove it writable, and set ``config.run.id`` where there is none.

        Raises:
            ConfigError: the directory cannot be written.
        """
        run = config.run
        for name in ("root", "name"):
            if not getattr(run, name):
                raise ConfigError(f"run.{name}", "''", "names a folder", f"run.{name}=my-{name}")
        parent = Path(run.root).expanduser().absolute() / run.name
        try:
            parent.mkdir(parents=True, exist_ok=True)
            if run.id is not None:
                path = parent / run.id
                path.mkdir(exist_ok=True)
            else:
                path = _claim(parent)
            probe = path / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                "run.root",
                run.root,
                f"the run directory {error.filename or parent} cannot be written: {error.strerror}",
                "run.root=DIRECTORY that you may write to",
            ) from None
        run.id = path.name
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run.

        Raises:
            ConfigError: no run is there; the message names the nearest one.
        """
        if _is_run(path):
            return cls(path)
        if below := _runs_below(path):
            near: Path | None = below[-1]
        else:
            known = {str(run): run for run in _runs_around(path)}
            match = difflib.get_close_matches(str(path), known, n=1, cutoff=0.0)
            near = known[match[0]] if match else None
        what = "is not a run directory (it holds no config.yaml)" if path.exists() else "does not exist"
        fix = f"did you mean {near}" if near else "give the directory that `muster train` printed"
        raise ConfigError("RUN_DIR", path, what, fix)

    @property
    def config_path(self) -> Path:
        """The config in force."""
        return self.path / "config.yaml"

    def config(self) -> RunConfig:
        """The config in force. Raises ConfigError."""
        return load_frozen(self.config_path)

    def full_config(self) -> RunConfig:
        """The config for all nodes: the one in force, or the newest before nodes were lost. Raises ConfigError."""
        numbered = sorted(
            (p for p in (self.path / "configs").glob("*.yaml") if p.stem.isdigit()), reverse=True
        )
        found = (load_frozen(path) for path in [self.config_path, *numbered])
        return next((config for config in found if config.launcher.num_nodes == -1), self.config())

    def asked(self) -> RunConfig | None:
        """What the user had written when the run began, blanks (-1, auto) included; None if not kept."""
        path = self.path / "configs" / "asked.yaml"
        return load_frozen(path) if path.is_file() else None

    def freeze(self, config: RunConfig, asked: RunConfig | None = None) -> None:
        """Keep a config as the next numbered generation and put it in force."""
        kept = self.path / "configs"
        numbers = [int(path.stem) for path in kept.glob("*.yaml") if path.stem.isdigit()]
        if asked is not None:
            freeze(asked, kept / "asked.yaml")
        freeze(config, kept / f"{max(numbers, default=-1) + 1:04d}.yaml")
        freeze(config, self.config_path)

    def environment(self) -> dict[str, Any]:
        """environment.json; {} if there is none."""
        try:
            found = json.loads((self.path / "environment.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Put environment.json in force."""
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def newest_checkpoint(self) -> int | None:
        """Step of the newest committed checkpoint."""
        steps = [
            int(match[1])
            for manifest in (self.path / "checkpoints").glob("step-*/manifest.json")
            if (match := _STEP.fullmatch(manifest.parent.name))
        ]
        return max(steps, default=None)

    def last_logged_step(self) -> int:
        """Step of the last whole line of metrics.jsonl; 0 if there is none."""
        try:
            with (self.path / METRICS_FILE).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
                lines = file.read().split(b"\n")[:-1]
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue
        return 0

    def next_generation(self) -> int:
        """A generation number that no start of this run has had."""
        seen = [event.get("generation", -1) for event in read_events(self.path / EVENTS_FILE)]
        seen += [int(p.name.partition("-")[2]) for p in (self.path / "logs").glob("generation-*")]
        return max(seen, default=-1) + 1

    def is_finished(self, steps: int) -> bool:
        """Whether a finished run has nothing left to do for ``steps`` steps."""
        ends = [e for e in read_events(self.path / EVENTS_FILE) if e.get("event") in ("start", "finish")]
        newest = self.newest_checkpoint()
        return bool(ends) and ends[-1]["event"] == "finish" and newest is not None and newest >= steps

    @contextmanager
    def lock(self, inherit_seconds: float | None = None) -> Iterator[None]:
        """Keep a second agent out of this directory for as long as this one runs.

        Args:
            inherit_seconds: for who has taken over the run: how long the agent before may take to end. One that
                does not has lost its term, and its workers their peers: it is not waited for.

        Raises:
            ConfigError: another agent is at work there.
        """
        with (self.path / ".lock").open("a+") as file:
            if not _locked(file, inherit_seconds or 0.0) and inherit_seconds is None:
                file.seek(0)
                raise ConfigError(
                    "RUN_DIR",
                    self.path,
                    f"is being trained by process {file.read().strip() or '?'}",
                    "wait for it or stop it (kill -TERM lets it save)",
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def discard(self) -> None:
        """Remove the directory if nothing was put into it."""
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()


def _locked(file: TextIO, seconds: float) -> bool:
    """Lock a file within so many seconds; whether it was possible."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.1)


def _claim(parent: Path) -> Path:
    while True:
        path = parent / choose_id()
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and path.resolve() != CONF_DIR


def _runs_below(path: Path) -> list[Path]:
    found = (file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/config.yaml"))
    return sorted(filter(_is_run, found))


def _runs_around(path: Path) -> list[Path]:
    """Runs near a mistyped path."""
    existing = next((parent for parent in path.absolute().parents if parent.is_dir()), Path.cwd())
    return _runs_below(existing) or _runs_below(Path.cwd() / "runs")
