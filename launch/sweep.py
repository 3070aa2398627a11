"""``muster train -m``: many runs, one after the other, each its own process group and run directory.

Hydra's sweeper decides the points; this module checks the choices before the first one runs, gives each
point its place, and keeps a record of it in ``<run.root>/<run.name>/<sweep>/points/``, so that a point that
fails or cannot work stops no other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, Transformer, ValueType
from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.outcome import EXIT_CONFIG, EXIT_DONE, EXIT_STOPPED, Outcome
from parallel.errors import ConfigError
from trainer import overrides as grammar
from trainer.compose import compose, compose_raw, to_run_config, write_atomically
from trainer.config import RunConfig
from trainer.metrics.jsonl import read_events, read_metrics
from trainer.metrics.schema import EVENTS_FILE, METRICS_FILE
from trainer.rundir import RunDirectory, choose_id

Train = Callable[[RunConfig], Outcome]

_MOST_CHOICES = 64
"""Choices of one override that are checked before the start."""


@dataclass
class Point:
    """What became of one point. ``status``: done, invalid, failed or stopped."""

    number: int
    overrides: list[str]
    status: str
    message: str = ""
    run_dir: str = ""
    train_loss: float | None = None
    valid_loss: float | None = None
    tokens_per_second: float | None = None

    @property
    def objective(self) -> float:
        """What an optimiser minimises: the validation loss, else the training loss; inf for a failure."""
        losses = [loss for loss in (self.valid_loss, self.train_loss) if loss is not None]
        return losses[0] if self.status == "done" and losses else math.inf


@dataclass
class Sweep:
    """One sweep: its id (the W&B group of its points), its folder and the overrides that Hydra gets.

    Attributes:
        common: key → value of the overrides that all points have, which are neither recorded nor shown with each.
    """

    name: str
    folder: Path
    overrides: list[str] = field(default_factory=list)
    common: dict[str, Any] = field(default_factory=dict)

    def run_point(self, config: RunConfig, number: int, overrides: list[str], train: Train) -> float:
        """Train one point and keep its record.

        Returns:
            The final validation loss (training loss where there was no evaluation), inf for a failure.

        Raises:
            SystemExit: the user stopped it, and with it the sweep.
        """
        config.run.group = config.run.group or self.name
        config.run.id = f"{config.run.id or self.name}-{number:02d}"
        own = [  # Hydra writes them anew (false as False), so texts cannot be compared
            text
            for text, o in zip(overrides, grammar.parse(overrides), strict=True)
            if o.key_or_group not in self.common or self.common[o.key_or_group] != o.value()
        ]
        point = Point(number, own, "failed", run_dir=_run_dir(config))
        console = Console(highlight=False)
        console.rule(Text(f"point {number}: {' '.join(own)}"))
        try:
            outcome = train(config)
            point.status = {EXIT_DONE: "done", EXIT_CONFIG: "invalid", EXIT_STOPPED: "stopped"}.get(
                outcome.code, "failed"
            )
            point.message = outcome.message
        except ConfigError as error:
            point.status, point.message = "invalid", str(error)
        except Exception as error:
            point.message = f"{type(error).__name__}: {error}"
        if point.message:
            console.print(Text(point.message), soft_wrap=True)
        _measure(point)
        write_atomically(self.folder / "points" / f"{number:04d}.json", json.dumps(asdict(point)) + "\n")
        if point.status == "stopped":
            raise SystemExit(EXIT_STOPPED)
        return point.objective

    def points(self) -> list[Point]:
        """The records kept so far, whichever process made them."""
        return [Point(**json.loads(path.read_text())) for path in sorted(self.folder.glob("points/*.json"))]

    def finish(self, console: Console, interrupted: bool = False) -> Outcome:
        """Print the table; 0 if every point is done, 2 if every one was invalid, 75 if stopped, else 1."""
        points = self.points()
        console.print()
        console.print(_table(self.name, points))
        console.print(Text(f"records: {self.folder}"), soft_wrap=True)
        states = {point.status for point in points}
        if interrupted or "stopped" in states:
            left = [f"\n  muster resume {point.run_dir}" for point in points if point.status == "stopped"]
            return Outcome(EXIT_STOPPED, "".join(["The sweep was stopped.", *left]))
        if states <= {"done"}:
            return Outcome(EXIT_DONE)
        return Outcome(EXIT_CONFIG if states == {"invalid"} else 1)


def check(overrides: list[str], config_dir: str | None) -> Sweep:
    """Compose every single choice of a sweep once, so that a typo is reported before anything runs.

    Raises:
        ConfigError: a choice that cannot be composed, whatever the others are.
    """
    parsed = grammar.parse(overrides)
    common = [o for o in parsed if not o.is_sweep_override()]
    fixed = [grammar.normalise(o) for o in common]
    base, hydra = compose_raw(fixed, config_dir)
    params = OmegaConf.to_container(hydra.sweeper).get("params") or {}  # type: ignore[union-attr]
    swept = {o.key_or_group: o for o in grammar.parse([f"{key}={value}" for key, value in params.items()])}
    swept |= {o.key_or_group: o for o in parsed if o.is_sweep_override()}
    first: RunConfig | None = None
    for choices in _diagonal(list(swept.values())):
        composed = compose([*fixed, *choices], config_dir)
        first = first or composed
    config = first or to_run_config(base)
    name = choose_id()
    folder = Path(config.run.root).expanduser().absolute() / config.run.name / name
    try:
        (folder / "points").mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            "run.root",
            config.run.root,
            f"{folder} cannot be made: {error.strerror}",
            "run.root=DIRECTORY that you may write to",
        ) from None
    lines = [grammar.normalise(override) for override in parsed]
    if not any(o.key_or_group == "hydra.sweep.dir" for o in parsed):
        quoted = str(folder).replace("'", "\\'")
        lines.append(f"hydra.sweep.dir='{quoted}'")
    return Sweep(name, folder, lines, {o.key_or_group: o.value() for o in common})


def _diagonal(swept: list[Override]) -> Iterator[list[str]]:
    """Sets of overrides in which every choice of every swept override occurs at least once."""
    choices = [[f"{o.get_key_element()}={value}" for value in _values(o)] for o in swept]
    choices = [values for values in choices if values]
    for index in range(max((len(values) for values in choices), default=0)):
        yield [values[index % len(values)] for values in choices]


def _values(override: Override) -> list[str]:
    """The choices of a swept override, as text; the lower end of an interval, none for a glob."""
    if override.is_interval_sweep():
        interval: Any = override.value()
        return [str(interval.start)]
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return []
    if not override.is_sweep_override():
        return [override.get_value_string()]
    found = override.sweep_iterator(transformer=Transformer.str)
    return [str(value) for value, _ in zip(found, range(_MOST_CHOICES), strict=False)]


def _run_dir(config: RunConfig) -> str:
    return str(RunDirectory.of(config).path)


def _measure(point: Point) -> None:
    """Read the losses and the speed from the point's own files."""
    records = read_metrics(Path(point.run_dir) / METRICS_FILE)

    def last(name: str) -> float | None:
        return next((record[name] for record in reversed(records) if record.get(name) is not None), None)

    events = read_events(Path(point.run_dir) / EVENTS_FILE)
    finish = next((event for event in reversed(events) if event.get("event") == "finish"), {})
    point.train_loss = last("loss/train")
    point.valid_loss = finish["loss_valid"] if finish.get("loss_valid") is not None else last("loss/valid")
    point.tokens_per_second = last("perf/tokens_per_second")


def _table(name: str, points: list[Point]) -> Table:
    table = Table(title=f"sweep {name}", title_justify="left", box=box.SIMPLE)
    for column in ("", "overrides", "status", "train loss", "valid loss", "tokens/s", "run"):
        table.add_column(column, overflow="fold", no_wrap=column in ("", "status"))
    for point in points:
        color = {"done": "green", "stopped": "yellow"}.get(point.status, "red")
        table.add_row(
            str(point.number),
            Text(" ".join(point.overrides)),
            Text(point.status, style=color),
            _number(point.train_loss, ".4f"),
            _number(point.valid_loss, ".4f"),
            _number(point.tokens_per_second, ",.0f"),
            Text(_shown(point.run_dir) if point.status != "invalid" else point.message),
        )
    return table


def _shown(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
