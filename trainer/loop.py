"""The training loop: steps, and around them evaluation, logging, checkpoints and hooks."""

from __future__ import annotations

import copy
import math
import socket
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel.dims import ParallelDims
from parallel.engines.base import Engine, Replayable
from parallel.errors import ConfigError
from trainer import faults
from trainer.callbacks import Callback
from trainer.checkpoint.cadence import Cadence
from trainer.checkpoint.digest import combine, weights_digest
from trainer.checkpoint.durable import DurableCheckpointer
from trainer.checkpoint.failed import FailedSaves
from trainer.checkpoint.memory import MemoryTier, rank_tensors_of
from trainer.checkpoint.peer import Member, PeerTier
from trainer.checkpoint.timeline import Timelines
from trainer.config import RunConfig
from trainer.cure.cure import Cure
from trainer.data.batch import Batch
from trainer.data.loader import Loader
from trainer.data.prepare import PreparedData
from trainer.deadlines import Deadlines
from trainer.generation import sample
from trainer.guard.findings import RollBack
from trainer.guard.guard import Guard
from trainer.health.monitor import Health
from trainer.metrics.step import Hardware, check_user_metrics, step_metrics
from trainer.profiling import Profile
from trainer.restoring import restore
from trainer.runlog import RunLog
from trainer.saving import TrainState, save_checkpoint, take_snapshot, trainer_state
from trainer.step import Stepper, StepResult
from trainer.straggler import Stragglers


@dataclass
class Trainer:
    """One rank's run. ``train`` is the whole story; built by :mod:`trainer.run`.

    Attributes:
        control: a gloo group over all ranks, for small facts (not tensors of the model).
        valid: this rank's held-out batches.
        failed_saves: what the ranks have agreed on about saves that failed.
        hardware: what tokens per second are measured against.
        cadence: which steps get a snapshot in memory.
        timelines: which of the run's states count.
        deadlines: keeps what is learned of them; None: not kept.
        stragglers: tells how long this rank works; None: ranks are not compared.
        cure: what is done about uneven and dead experts; None: nothing.
        guard: decides whether a step commits; None: every one does.
        memory: this rank's snapshots; None: off.
        profile: of some steps; None: none is asked for, or not of this rank.
        peers: copies on other nodes; None: off, or there is one node only.
        members: where every rank's ``peers`` listens.
        began_anew: whether no state of this run was found when it started.
        has_begun: whether :meth:`train` was called.
        first_state: the trainer's state and this rank's tensors before the first step, where it began anew.
        num_restores: in this process.
        result: of the newest step that was committed.
    """

    config: RunConfig
    dims: ParallelDims
    rank: int
    run_dir: Path
    engine: Engine
    stepper: Stepper
    loader: Loader
    prepared: PreparedData
    valid: list[Batch]
    checkpoints: DurableCheckpointer
    failed_saves: FailedSaves
    log: RunLog
    callbacks: list[Callback]
    health: Health
    hardware: Hardware
    control: dist.ProcessGroup
    cadence: Cadence
    timelines: Timelines
    deadlines: Deadlines | None = None
    stragglers: Stragglers | None = None
    cure: Cure | None = None
    guard: Guard | None = None
    memory: MemoryTier | None = None
    profile: Profile | None = None
    peers: PeerTier | None = None
    members: Sequence[Member] = ()
    began_anew: bool = False
    has_begun: bool = False
    first_state: tuple[dict[str, Any], dict[str, Tensor]] | None = None
    num_restores: int = 0
    state: TrainState = field(default_factory=TrainState)
    result: StepResult | None = None
    _since_log: list[float] = field(default_factory=list)

    def train(self) -> bool:
        """Run to the last step, or until asked to stop. Returns whether the run is finished. Collective.

        Raises:
            StorageError: the last checkpoint could not be written, or too many before it in a row.
        """
        config, state = self.config, self.state
        self.stepper.on_gradients = self._on_gradients
        self.stepper.observer = self.health
        self.stepper.gate = self.guard
        self.health.begin(state.step)
        for callback in self.callbacks:
            callback.on_start(self)
        if state.step == 0 and config.eval.every:
            state.untrained_loss, _ = self.evaluate()
        self.has_begun = True
        if self.guard is not None:
            self.guard.loaded(state.step)
        if self.began_anew:
            self.first_state = copy.deepcopy(trainer_state(self)), rank_tensors_of(self.stepper.device)
        while self.state.step < config.train.steps:
            if self.profile is not None:
                self.stepper.pulse.enter("hooks")  # it may have much to write
                self.profile.reach(self.state.step + 1, self)
            num_restores = self.num_restores
            result, state = self.step(), self.state
            if self.num_restores > num_restores:  # the guard has gone back to an earlier step
                continue
            self.log.stepped(state.step)
            last = state.step == config.train.steps
            evaluated = config.eval.every > 0 and (last or _due(state.step, config.eval.every))
            logged = evaluated or last or _due(state.step, config.logger.every)
            record = {} if result is None else self._end_step(result, logged)
            if self.num_restores > num_restores:  # a hook has gone back to an earlier step
                continue
            improved = evaluated and self._evaluate_and_log(record)
            if logged and not evaluated and result is not None:
                self._write(record, None)
            stop = result is not None and result.stop
            if not self._confirmed():
                continue
            if _due(state.step, config.checkpoint.every) or last or improved or stop:
                self.save(best=improved)
            if self.cadence.due(state.step):
                take_snapshot(self)
                self.stepper.pulse.commit(state.step)
            self._log_saves()
            self._tell_stragglers()
            if self.deadlines is not None:
                self.deadlines.stepped()
            if stop and not last:
                self.stepper.pulse.enter("finish")
                self._end_profile()
                self._tell_stragglers(last=True)
                self.health.finish()
                self._last_save()
                why = {"reason": "asked to stop", "resumable": True, **self._who_was_asked()}
                self.log.event("stop", state.step, **why)
                return False
        self._finish()
        return True

    def step(self) -> StepResult | None:
        """One optimizer step on the next samples; None: stepped over, or the run went back. Collective."""
        began = time.perf_counter()
        if self.stragglers is not None:
            self.stragglers.begin()
        pulse = self.stepper.pulse
        pulse.enter("data", self.state.step + 1)
        faults.reach("batch", self.state.step)
        batches = self.loader.next_step()
        pulse.enter("hooks")
        for callback in self.callbacks:
            callback.on_batches(self, batches)
        attempt = partial(self._attempt, batches)
        try:
            result = (
                attempt() if self.guard is None else self.guard.run(self.state.step + 1, batches, attempt)
            )
        except RollBack as back:
            self._go_back(back)
            return None
        self.state.step += 1
        self.state.tokens += self.config.train.global_batch * self.config.train.seq_len
        if result is not None:
            self.result = result
            self.health.leave()
            if self.cure is not None:  # here, where no parameter is gathered: what is written must be seen
                with self._writing(True):
                    actions = self.cure.after_step(self.state.step, result.totals)
                if actions and self.memory is not None:
                    self.memory.start_anew()
                for fields in actions:
                    self.log.event("cure", self.state.step, **fields)
            if self.stragglers is not None:
                self.stragglers.stepped(result.totals.counts_LE)
        self._since_log.append(time.perf_counter() - began)
        self.cadence.stepped(self._since_log[-1])
        return result

    def _attempt(self, batches: list[Batch]) -> StepResult:
        self.health.enter("train", self.state.step + 1)  # forgets what an attempt before this one showed it
        result = self.stepper.train_step(self.state.step, batches)
        self.stepper.pulse.enter("hooks")
        return result

    def _confirmed(self) -> bool:
        """Whether the newest step was committed, where its state will be kept; if not, the run has gone back."""
        state, config = self.state, self.config
        last = state.step == config.train.steps
        stop = self.result is not None and self.result.stop
        keeps = last or stop or _due(state.step, config.checkpoint.every) or self.cadence.due(state.step)
        if self.guard is None or (not keeps and state.best_step != state.step):
            return True
        try:
            self.guard.confirm()
        except RollBack as back:
            self._go_back(back)
            return False
        return True

    def _go_back(self, back: RollBack) -> None:
        self.restore(back.at_most, back.reason)
        if back.failure is not None:
            raise back.failure

    def _writing(self, may: bool) -> AbstractContextManager[None]:
        """Around those who may write weights or optimizer state between two updates, if they do (``may``)."""
        return nullcontext() if self.guard is None or not may else self.guard.writing(self.state.step)

    def _who_was_asked(self) -> dict[str, Any]:
        """The first rank that was asked to stop, and the signal that it was given. Collective."""
        told: list[Any] = [None] * dist.get_world_size(self.control)
        mine = (self.stepper.stop_cause(), socket.gethostname())
        dist.all_gather_object(told, mine, group=self.control)
        rank = next((rank for rank, (cause, _) in enumerate(told) if cause is not None), self.rank)
        return {"kind": "preempted", "rank": rank, "host": told[rank][1], "cause": told[rank][0]}

    def _on_gradients(self) -> None:
        if self.callbacks:
            self.stepper.pulse.enter("hooks")  # they take the time that they take
        for callback in self.callbacks:
            callback.on_gradients(self)
        self.stepper.pulse.enter("compute")

    def evaluate(self) -> tuple[float, bool]:
        """Held-out loss in nats a token, and whether it is the lowest so far. Collective."""
        began = time.perf_counter()
        self.health.enter("valid", self.state.step)
        totals = self.stepper.evaluate(self.valid)
        self.health.leave()
        loss = totals.mean(totals.cross_entropy)
        # A loss that is not a number is never the best.
        best = math.isfinite(loss) and (self.state.best_loss is None or loss < self.state.best_loss)
        self.state.valid_loss = loss
        seconds = time.perf_counter() - began
        self.log.event("evaluation", self.state.step, loss_valid=loss, best=best, seconds=seconds)
        for callback in self.callbacks:
            callback.on_evaluation(self, loss)
        return loss, best

    def save(self, best: bool = False) -> None:
        """Begin a checkpoint of this step; returns after the copy. Collective.

        Args:
            best: whether to name it ``checkpoints/best``.

        Raises (on every rank):
            StorageError: ``checkpoint.max_failed_saves`` saves in a row have failed.
        """
        save_checkpoint(self, best)

    def restore(self, at_most: int | None = None, reason: str = "asked for") -> int:
        """Go back, in this process, to the newest state that is complete and verified in any tier. Collective.

        Weights, optimizer, data, random numbers, health, cures and callbacks stand as they did then; what was
        kept of later steps does not count any more. Call it between steps, or in ``Callback.on_step_end``.

        Args:
            at_most: no later step than this; None: the newest there is.
            reason: for the event ``rollback``.

        Returns:
            The step; 0 with the weights that the run began with, where nothing earlier was kept.
        """
        step = restore(self, at_most, reason)
        if self.guard is not None:
            self.guard.loaded(step)
        return step

    def give_memory_back(self) -> None:
        """Do without snapshots from here on: what they hold is on the disk, or not wanted."""
        if self.memory is not None:
            self.memory.wait()
            if self.peers is not None:
                self.peers.wait()
                self.peers.remove()
            self.memory.remove()
        self.memory = self.peers = None
        if isinstance(self.engine, Replayable):
            self.engine.keep_updates = False

    def forget_times(self) -> None:
        """Of steps that were not logged: they are given up."""
        self._since_log.clear()

    def link_best(self) -> None:
        """Name the best step again, in case the run died between its commit and its naming."""
        best = self.state.best_step
        if self.rank == 0 and best is not None and self.checkpoints.committed(best):
            self.checkpoints.mark_best(best)

    def digest(self) -> str:
        """``weights_digest`` of the weights and buffers as they are now. Collective."""
        own = weights_digest(p for p in self.engine.named_state() if p.name.startswith("model."))
        parts: list[Any] = [None] * dist.get_world_size(self.control)
        dist.all_gather_object(parts, own, group=self.control)
        return combine(parts)

    def _evaluate_and_log(self, record: dict[str, Any]) -> bool:
        """Evaluate at this step and log it with the step; returns whether it is the best so far."""
        loss, best = self.evaluate()
        self._write(record, loss)
        if best:
            self.state.best_loss, self.state.best_step = loss, self.state.step
        return best

    def _end_step(self, result: StepResult, logged: bool) -> dict[str, Any]:
        """Metrics of this step where they are logged. The conversions to numbers are its only host syncs."""
        record: dict[str, Any] = {}
        if logged and self.log.active:
            seconds = sum(self._since_log) / len(self._since_log)
            record = step_metrics(result, self.config, self.hardware, seconds)
            record |= {} if self.cure is None else self.cure.metrics()
            record |= {} if self.stragglers is None else self.stragglers.metrics()
        if logged:
            record.update(self.health.metrics(result.totals))
        self.health.after_step(self.state.step, result.totals)
        may_write = any(type(hook).on_step_end is not Callback.on_step_end for hook in self.callbacks)
        if may_write and self.memory is not None:
            self.memory.start_anew()
        with self._writing(may_write):
            for index, callback in enumerate(self.callbacks):
                own = callback.on_step_end(self, record) or {}
                check_user_metrics(own, f"callbacks[{index}].target", self.config.callbacks[index].target)
                if logged:
                    record.update(own)
        return record

    def _write(self, record: dict[str, Any], valid_loss: float | None) -> None:
        if valid_loss is not None:
            record["loss/valid"] = valid_loss
        record.update(step=self.state.step, tokens=self.state.tokens)
        self.log.metrics(record, sum(self._since_log))
        self._since_log.clear()

    def _tell_stragglers(self, last: bool = False) -> None:
        """Write what is due of slow ranks. Raises NamedFailure of one that is to be replaced."""
        if self.stragglers is not None:
            for fields in self.stragglers.last_alarms() if last else self.stragglers.alarms():
                self.log.event("alarm", self.state.step, **fields)

    def _log_saves(self) -> None:
        """Log the saves that were committed meanwhile, and one that failed."""
        for done in self.checkpoints.poll():
            self.log.event(
                "checkpoint",
                done.step,
                path=str(done.path),
                bytes=done.bytes,
                stall_seconds=done.seconds_stalled,
                write_seconds=done.seconds_written,
            )
        self.failed_saves.report()

    def _end_profile(self) -> None:
        if self.profile is not None:
            self.profile.end(self.state.step)

    def _last_save(self) -> None:
        """Wait for a save that no other will follow: if it fails, that is an error at once."""
        self.checkpoints.join()
        self._log_saves()
        self.checkpoints.wait()

    def _finish(self) -> None:
        self.stepper.pulse.enter("finish")
        self._end_profile()
        self._tell_stragglers(last=True)
        self._last_save()
        self.health.finish()
        for callback in self.callbacks:
            callback.on_finish(self)
        config, state = self.config, self.state
        text = self._sample() if config.eval.sample_tokens else None
        self.log.event(
            "finish",
            state.step,
            weights_digest=self.digest(),
            goodput=self.log.goodput(),
            seconds=self.log.seconds(),
            loss_valid=state.valid_loss,
            loss_valid_untrained=state.untrained_loss,
            unigram_loss=self.prepared.unigram_loss,
            best_step=state.best_step,
            best_loss=state.best_loss,
            sample=None if text is None else {"prompt": config.eval.sample_prompt, "text": text},
        )

    def _sample(self) -> str | None:
        config = self.config
        self.stepper.enter("sample")
        try:
            return sample(
                self.engine.model,
                self.prepared.tokenizer,
                config.eval.sample_prompt,
                config.eval.sample_tokens,
                device=self.stepper.device,
                context=config.train.seq_len,
                seed=config.train.seed,
            )
        except ConfigError as error:  # the same on every rank; a finished run must not fail over its sample
            self.log.event("alarm", self.state.step, kind="sample", message=str(error))
            return None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
