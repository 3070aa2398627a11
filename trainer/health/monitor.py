"""Watches the routing of a run from beside its loop: window, alarms, maps, traces, replay.

Stepper.forward ── routes ──▶ recorded choices, if they are replayed
                ── saw ────▶ maps, trace                              (this rank's micro-batches)
Trainer         ── enter / leave around a step or an evaluation ──▶ health.jsonl
                ── after_step(totals) ──▶ window, alarms              (equal on every rank)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.exchange_timer import ExchangeTimer
from trainer.config import RunConfig
from trainer.config_moe import RouterName
from trainer.data.batch import Batch
from trainer.data.prepare import PreparedData
from trainer.health.alarms import Alarm, Alarms, evenness
from trainer.health.maps import RoutingMaps
from trainer.health.ranks import rank_shares
from trainer.health.trace import FOLDER, Trace, TraceFacts, TraceWriter, forget_later
from trainer.health.window import Window
from trainer.models.transformer import Losses, moe_layers
from trainer.runlog import RunLog
from trainer.step import Totals


class Health:
    """One rank's watch. Only :meth:`leave`, :meth:`after_step` and :meth:`waited` may wait for the device, and only
    where something is written.

    Args:
        config: resolved.
        rank: of this process.
        run_dir: of the run.
        prepared: the data, for its domains and fingerprint.
        device: of the model.
        log: where records and alarms go.
        timer: of the exchanges; None where there are none.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        world_size: int,
        run_dir: Path,
        prepared: PreparedData,
        device: torch.device,
        log: RunLog,
        timer: ExchangeTimer | None = None,
    ) -> None:
        self.config, self.rank, self.prepared, self.device = config, rank, prepared, device
        self.log, self.timer = log, timer
        health = config.health
        self.layers = moe_layers(config)
        num_tokens = config.train.global_batch * config.train.seq_len
        self.window = Window(health.window, num_tokens)
        self.alarms = Alarms(config, self.layers)
        self._traces = run_dir / FOLDER
        self._writer: TraceWriter | None = None
        if health.trace_every:
            self._writer = TraceWriter(self._traces, rank, world_size, prepared.fingerprint)
        self._replay = None if health.replay is None else Trace(Path(health.replay), _facts(config, prepared))
        self._split, self._step = "", 0
        self._maps: RoutingMaps | None = None
        self._tracing = False

    def begin(self, step: int) -> None:
        """State is loaded and ``step`` steps are done: check what is to be replayed, forget later traces.

        Raises:
            ConfigError: the trace to replay lacks a step of this run.
        """
        config = self.config
        if self._replay is not None:
            self._replay.require("train", range(step + 1, config.train.steps + 1))
        if self.rank == 0:
            forget_later(self._traces, step)

    def enter(self, split: str, step: int) -> None:
        """A training step (its number, the first is 1) or an evaluation after that many steps begins.

        What was seen since the last :meth:`leave` is forgotten: of a step that did not commit.
        """
        health = self.config.health
        self._split, self._step = split, step
        evaluating = split == "valid"
        self._maps = None
        if health.every and (evaluating or _due(step, health.maps_every)):
            self._maps = RoutingMaps(self.prepared.domains.names if evaluating else ())
        traced = health.trace_every > 0 and (evaluating or _due(step, health.trace_every))
        self._tracing = self._writer is not None and traced
        if self._writer is not None:
            self._writer.drop()
        if self.timer is not None:
            self.timer.begin()

    def routes(self, batch: Batch) -> Sequence[Tensor] | None:
        """The recorded choices of a micro-batch; None: the routers choose."""
        if self._replay is None or (self._split == "valid" and not self._replay.has_evaluations):
            return None
        return self._replay.choices(self._split, self._step, batch.sample_ids, self.device)

    def saw(self, batch: Batch, losses: Losses) -> None:
        """A micro-batch went forward. No host sync."""
        if self._maps is not None:
            self._maps.add(losses.moe, batch, self._domains(batch))
        if self._tracing and losses.moe:
            assert self._writer is not None
            self._writer.add(losses.moe, batch.sample_ids)

    def _domains(self, batch: Batch) -> Tensor | None:
        if self._split != "valid":
            return None
        ids = batch.sample_ids.cpu().numpy()  # held-out batches wait on the CPU: nothing to wait for there
        return torch.from_numpy(self.prepared.domains.of(ids.clip(0))).to(self.device)

    def leave(self) -> None:
        """The step or evaluation has ended. Collective where maps were counted."""
        if self._maps is not None:
            self._maps.reduce()
            if self.log.active:
                record = self._maps.record(self._numbered(self._maps.num_layers))
                if record:
                    self._write("maps", split=self._split, **record)
        if self._tracing:
            assert self._writer is not None
            self._writer.save(self._split, self._step, self._numbered(self._writer.num_layers))
        self._maps, self._tracing = None, False

    def after_step(self, step: int, totals: Totals) -> list[Alarm]:
        """Take in a step's totals; where the window is due, judge it. The same on every rank.

        Returns:
            What began or ended, already logged.
        """
        health = self.config.health
        if not health.every or not len(totals.counts_LE):
            return []
        self.window.update(totals)
        if not _due(step, health.every):
            return []
        found = self._judge(step)
        for alarm in found:
            self.log.event("alarm", step, **alarm.fields())
        return found

    def _judge(self, step: int) -> list[Alarm]:
        reading = self.window.read()
        layers = self._numbered(len(reading.share_LE))
        if layers != self.alarms.layers:  # of a model of the user's own, numbered as they come
            self.alarms.layers = layers
        if self.log.active:
            config = self.config
            record: dict[str, Any] = {
                "layers": layers,
                "max_over_mean": reading.max_over_mean_L.tolist(),
                "num_effective": reading.num_effective_L.tolist(),
                "evenness": evenness(reading, config.layout.top_k).tolist(),
                "router_entropy": reading.entropy_L.tolist(),
                "router_confidence": reading.confidence_L.tolist(),
                "idle_steps": reading.idle_LE.amax(1).tolist(),
                "drop_rate": reading.dropped_L.tolist(),
                "unserved_rate": reading.unserved_L.tolist(),
            }
            share_LR = rank_shares(config, reading.share_LE)
            if share_LR is not None:
                record["rank_share"] = share_LR.tolist()
            self._write("window", **_rounded(record))
        return self.alarms.check(step, reading)

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Of a logged step, beside those of :func:`trainer.metrics.step.step_metrics`. Collective."""
        found = {}
        if self.timer is not None and len(totals.counts_LE):
            found["moe/wait_seconds"] = self.timer.waited()
        return found

    def finish(self) -> None:
        """Wait until every trace is on the disk. Raises StorageError if one is not."""
        if self._writer is not None:
            self._writer.close()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the same on every rank."""
        return {"window": self.window.state_dict(), "alarms": self.alarms.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the window and the open alarms; without a state (of an older run) both begin anew."""
        self.window.load_state_dict(state.get("window", {}))
        self.alarms.load_state_dict(state.get("alarms", {}))

    def _write(self, kind: str, **fields: Any) -> None:
        self.log.health({"step": self._step, "time": time.time(), "kind": kind, **fields})

    def _numbered(self, num_layers: int) -> list[int]:
        return self.layers if len(self.layers) == num_layers else list(range(num_layers))


def _facts(config: RunConfig, prepared: PreparedData) -> TraceFacts:
    layout = config.layout
    num_experts = layout.num_experts + layout.num_zero_experts + layout.num_copy_experts
    by_experts = layout.router is RouterName.expert_choice  # any number of them may pick a token
    num_choices = num_experts if by_experts else layout.top_k
    layers = tuple(moe_layers(config))
    return TraceFacts(prepared.fingerprint, layers, num_experts, num_choices, config.train.seq_len)


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Five digits are more than any picture shows, and a third of the bytes."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(item) for item in value]
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return {name: short(value) for name, value in record.items()}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
