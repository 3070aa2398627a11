"""What a run's files say about it, read once: shared by the report and the summary after a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel.errors import ConfigError
from trainer.metrics.goodput import Account, account
from trainer.metrics.health import read_health
from trainer.metrics.jsonl import read_events, read_metrics
from trainer.metrics.schema import (
    EVENTS_FILE,
    METRICS_FILE,
    Record,
    as_float,
    interrupts,
    load_layer,
    load_name,
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class History:
    """The records and events of one run directory, and what health.jsonl says of the routing."""

    run_dir: Path
    records: list[Record]
    events: list[Record]
    health: list[Record] = field(default_factory=list)

    @classmethod
    def load(cls, run_dir: Path) -> History:
        """Read a run directory, finished or not.

        Raises:
            ConfigError: the directory holds no run.
        """
        if not (run_dir / EVENTS_FILE).is_file() and not (run_dir / METRICS_FILE).is_file():
            raise ConfigError(
                "run_dir",
                run_dir,
                f"a run directory holds {EVENTS_FILE} and {METRICS_FILE}",
                "give the directory that training printed, runs/NAME/ID",
            )
        records, events = read_metrics(run_dir / METRICS_FILE), read_events(run_dir / EVENTS_FILE)
        return cls(run_dir, records, events, read_health(run_dir))

    def all(self, *names: str) -> list[Record]:
        """Events of these kinds, oldest first."""
        return [event for event in self.events if event.get("event") in names]

    def last(self, *names: str) -> Record:
        """The newest event of these kinds; {} if there is none."""
        return next(iter(reversed(self.all(*names))), {})

    @property
    def start(self) -> Record:
        """The newest start event: the facts of the run."""
        return self.last("start")

    @property
    def finish(self) -> Record:
        """The finish event; {} while the run goes on and after a resume that has not finished."""
        last = self.last("start", "finish")
        return last if last.get("event") == "finish" else {}

    @property
    def state(self) -> str:
        """``finished``, ``stopped``, ``failed`` or ``running``, as far as the last event tells."""
        marks = self.all("start", "restart", "rollback", "failure", "stop", "finish")
        marks = [event for event in marks if event["event"] != "failure" or interrupts(event)]
        last = marks[-1]["event"] if marks else None
        return {"finish": "finished", "stop": "stopped", "failure": "failed"}.get(str(last), "running")

    @property
    def name(self) -> str:
        """``<name>/<id>``, as the run directory is called."""
        path = self.run_dir.resolve()
        return f"{path.parent.name}/{path.name}"

    @property
    def account(self) -> Account:
        """Where the seconds went."""
        return account([event for event in self.events if "event" in event], self.records)

    def series(self, name: str) -> tuple[Array, Array]:
        """(steps, values) of a metric, each [n], in order of steps; empty if never logged."""
        points = {int(record["step"]): as_float(record[name]) for record in self.records if name in record}
        return _arrays(points.items())

    def valid(self) -> tuple[Array, Array]:
        """(steps, nats a token) of validations, from metrics and evaluation events, in order of steps."""
        points = {int(event["step"]): as_float(event["loss_valid"]) for event in self.all("evaluation")}
        points |= {int(r["step"]): as_float(r["loss/valid"]) for r in self.records if "loss/valid" in r}
        return _arrays(points.items())

    def layers(self) -> list[int]:
        """Indices of the layers whose expert load was logged."""
        names = {name for record in self.records for name in record}
        return sorted(layer for name in names if (layer := load_layer(name)) is not None)

    def load_ratio(self, layer: int) -> tuple[Array, Array]:
        """(steps [n], load of each expert / mean load [n, num_experts]) of a layer."""
        rows = {int(r["step"]): r[load_name(layer)] for r in self.records if r.get(load_name(layer))}
        num_experts = max((len(row) for row in rows.values()), default=0)
        rows = {step: row for step, row in rows.items() if len(row) == num_experts}
        steps = sorted(rows)
        matrix = np.array([[as_float(share) for share in rows[step]] for step in steps], dtype=np.float64)
        return np.array(steps, dtype=np.float64), matrix.reshape(len(steps), num_experts) * num_experts

    def losses(self) -> dict[str, float]:
        """Final losses in nats a token: train, valid, untrained, unigram, best; absent if unknown."""
        finish, valid = self.finish, self.valid()
        first = {"untrained": valid[1][0]} if len(valid[0]) and valid[0][0] == 0 else {}
        train = self.series("loss/train")[1]
        found = {
            "train": train[-1] if len(train) else None,
            "valid": finish.get("loss_valid", valid[1][-1] if len(valid[1]) else None),
            "untrained": finish.get("loss_valid_untrained", first.get("untrained")),
            "unigram": finish.get("unigram_loss"),
            "best": finish.get("best_loss", np.nanmin(valid[1]) if np.isfinite(valid[1]).any() else None),
        }
        return {name: float(value) for name, value in found.items() if value is not None}

    def mean_rate(self) -> float | None:
        """Tokens a second over all logged steps, by their own seconds; None if unknown."""
        rate = self.series("perf/tokens_per_second")[1]
        rate = rate[np.isfinite(rate) & (rate > 0)]
        # Every step has the same tokens, so seconds a token average, rates do not.
        return float(1.0 / np.mean(1.0 / rate)) if len(rate) else None


def _arrays(points: Iterable[tuple[int, float]]) -> tuple[Array, Array]:
    ordered = sorted(points)
    steps = np.array([step for step, _ in ordered], dtype=np.float64)
    return steps, np.array([value for _, value in ordered], dtype=np.float64)
