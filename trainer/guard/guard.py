"""Whether a step commits, and what is done with one that does not.

::

    attempt ─▶ all ranks agree (in the step's one all-reduce) ─▶ fine: weights, optimizer and biases are updated
                                                             └▶ not: nothing is; the step is redone on its batch
    it recurs ─▶ the batch is stepped over and noted in guard.json; over the budget, the run gives up (exit 70)
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engines.base import Engine
from parallel.errors import FatalError
from trainer.config import RunConfig
from trainer.guard.ledger import LEDGER_FILE, Ledger
from trainer.guard.spikes import Spikes
from trainer.runlog import RunLog
from trainer.step import FAULTS, StepResult, Totals


@dataclass(frozen=True)
class Finding:
    """Why a step does not commit; the same on every rank.

    Attributes:
        kind: ``non_finite`` or ``spike``.
        value: the loss, nats a token.
        threshold: that the loss was above; None where it or a gradient is not finite.
        rank, host: where it was seen first; None of what only the sum over all ranks shows.
        what: it was, for a person.
    """

    kind: str
    value: float
    threshold: float | None
    rank: int | None
    host: str | None
    what: str


class Guard:
    """One rank's guard; every rank comes to the same decisions. See :class:`trainer.step.Gate`.

    Args:
        config: resolved.
        engine: prepared.
        control: a gloo group over all ranks, for small facts.
        rank: of this process.
        run_dir: of the run, for the ledger.
        data: fingerprint of the data.
        log: where alarms go.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        control: dist.ProcessGroup,
        rank: int,
        run_dir: Path,
        data: str,
        log: RunLog,
    ) -> None:
        self.config, self.engine, self.control, self.rank, self.log = config, engine, control, rank, log
        guard = config.guard
        self.ledger = Ledger(run_dir / LEDGER_FILE, data, config.train.global_batch)
        self.spikes = Spikes(guard.spike_sigma, guard.spike_window)
        self._undecided: tuple[Totals, Tensor] | None = None
        self._finding: Finding | None = None

    def begin(self) -> None:
        """Read the ledger of the run. Collective."""
        entries: list[Any] = [self.ledger.read() if self.rank == 0 else None]
        dist.broadcast_object_list(entries, src=0, group=self.control)
        self.ledger.load(entries[0])

    def corrupt(self) -> Tensor | None:
        """Nothing is looked at."""
        return None

    def judge(self, totals: Totals, finite: Tensor) -> Tensor | None:
        """See :class:`trainer.step.Gate`.

        On a CPU reading a number costs nothing, so the finding is made here, where the gradients still show where
        they went wrong. Otherwise the device decides, and the host reads the decision once it has queued all of
        the step (:meth:`run`).
        """
        self._finding, self._undecided = None, None
        if totals.cross_entropy.device.type == "cpu":
            self._finding = self._look(totals, finite, gradients=True)
            return None if self._finding is None else torch.ones(())
        self._undecided = (totals, finite)
        assert totals.faults is not None
        loss = totals.cross_entropy / totals.num_targets
        bad = (totals.faults.sum() > 0) | ~(loss <= self.spikes.threshold()) | ~torch.isfinite(loss)
        return bad.float()

    def run(self, step: int, attempt: Callable[[], StepResult]) -> StepResult | None:
        """Attempt a step until it commits or its batch is stepped over. Collective.

        Args:
            step: its number; the first is 1.
            attempt: forward, backward and update on the step's batches, any number of times.

        Returns:
            The attempt that was committed; None: the batch was stepped over.

        Raises:
            FatalError: the budget of skips is spent.
        """
        if self.ledger.has(step):
            return None
        random = _random_state()
        for left in ("redone", "stepped over"):
            result = attempt()
            finding = self._found()
            if finding is None:
                self.spikes.add(result.totals.mean(result.totals.cross_entropy))
                return result
            if left == "stepped over":
                self._check_budget(step, finding)
                self.ledger.add(step, finding.kind, write=self.rank == 0)
            self._say(step, finding, left)
            _set_random_state(random)
        return None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the same on every rank."""
        return {"spikes": self.spikes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; without a state everything begins anew."""
        self.spikes.load_state_dict(state.get("spikes", {}))

    def _found(self) -> Finding | None:
        if self._undecided is not None:
            self._finding = self._look(*self._undecided, gradients=False)
        return self._finding

    def _look(self, totals: Totals, finite: Tensor, gradients: bool) -> Finding | None:
        """What is wrong with a step, if anything is. A host sync; collective where something is."""
        assert totals.faults is not None
        faults = dict(zip(FAULTS, totals.faults.tolist(), strict=True))
        loss = totals.mean(totals.cross_entropy)
        if faults["non_finite"] or not math.isfinite(loss):
            return self._locate(loss, bool(finite), gradients)
        threshold = self.spikes.threshold()
        if loss > threshold:
            return Finding("spike", loss, threshold, None, None, "the loss is far above those before it")
        return None

    def _locate(self, loss: float, finite: bool, gradients: bool) -> Finding:
        """Which rank's loss, or else which rank's part of which gradient, is not finite. Collective."""
        names = (
            piece.name for piece in self.engine.named_gradients() if not torch.isfinite(piece.tensor).all()
        )
        gradient = next(names, None) if gradients else None
        mine = (finite, gradient, socket.gethostname())
        found: list[Any] = [None] * dist.get_world_size(self.control)
        dist.all_gather_object(found, mine, group=self.control)
        for rank, (its_finite, _, host) in enumerate(found):
            if not its_finite:
                return Finding("non_finite", loss, None, rank, host, "its loss is not finite")
        for rank, (_, name, host) in enumerate(found):
            if name is not None:
                what = f"its part of the gradient of {name} is not finite"
                return Finding("non_finite", loss, None, rank, host, what)
        return Finding("non_finite", loss, None, None, None, "the gradients' norm is not finite")

    def _check_budget(self, step: int, finding: Finding) -> None:
        guard = self.config.guard
        for field, used, allowed in (
            ("max_skips_in_a_row", self.ledger.in_a_row_before(step), guard.max_skips_in_a_row),
            ("max_skips", self.ledger.before(step), guard.max_skips),
        ):
            if used >= allowed:
                cause = (
                    f"step {step} is {_words(finding)}, twice on the same batch, and {used} batches were "
                    f"stepped over before it (guard.{field}={allowed})"
                )
                raise FatalError("non-finite", cause, finding.rank, finding.host)

    def _say(self, step: int, finding: Finding, action: str) -> None:
        done = (
            "it is redone" if action == "redone" else "it recurred on the same batch, which is stepped over"
        )
        self.log.event(
            "alarm",
            step,
            kind=finding.kind,
            message=f"step {step} is {_words(finding)}; {done}",
            value=finding.value,
            threshold=finding.threshold,
            rank=finding.rank,
            host=finding.host,
            action=action,
        )


def _words(finding: Finding) -> str:
    where = "" if finding.rank is None else f"rank {finding.rank} on {finding.host}: "
    if finding.kind == "spike":
        return f"a loss spike ({finding.value:.4g} > {finding.threshold:.4g})"
    return f"not finite ({where}{finding.what})"


def _random_state() -> tuple[Tensor, Tensor | None]:
    """Of the generators that a model of the user's own may draw from; the project's own draws are counter-based."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def build_guard(
    config: RunConfig,
    engine: Engine,
    control: dist.ProcessGroup,
    rank: int,
    run_dir: Path,
    data: str,
    log: RunLog,
) -> Guard | None:
    """What the config asks for; None where that is nothing. Collective."""
    if not config.guard.non_finite:
        return None
    guard = Guard(config, engine, control, rank, run_dir, data, log)
    guard.begin()
    return guard
