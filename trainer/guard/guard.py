"""Whether a step commits, and what is done with one that does not.

::

    attempt ─▶ all ranks agree (in the step's one all-reduce) ─▶ fine: weights, optimizer and biases are updated
                                                             └▶ not: nothing is; the step is redone on its batch
    it recurs ─▶ the run goes back to a state in some tier, and comes to the step again
    and again ─▶ the batch is stepped over and noted in guard.json; over the budget, the run gives up (exit 70)

    state that changed by itself (:mod:`trainer.guard.watch`) ─▶ the rank is named, the run goes back past it

On a CPU the host decides: reading a number costs nothing there. Otherwise the device does, and the host learns of
it one step later, when it has queued the next step and nothing waits. Until then nothing commits after a step that
did not, and whoever wants to keep the state asks first (:meth:`Guard.confirm`). A bad step is then redone by going
back.
"""

from __future__ import annotations

import math
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.dims import ParallelDims
from parallel.errors import FatalError, NamedFailure
from trainer.config import GuardConfig, RunConfig
from trainer.data.batch import Batch
from trainer.guard.findings import Finding, RollBack
from trainer.guard.ledger import Ledger
from trainer.guard.spikes import Spikes
from trainer.guard.watch import Corruption, Watch
from trainer.runlog import RunLog
from trainer.step import FAULTS, Stepper, StepResult, Totals

_ACTIONS = {
    "redone": "it is redone",
    "rolled back": "the run goes back to come to it again",
    "stepped over": "it recurred on the same batch, which is stepped over",
}
"""What is done the first, the second and the third time → how it is said."""


class _Facts:
    """What an attempt of a step came to, on its way from the device to the host.

    Args:
        step: number of the step.
        values: fp64: a count a :data:`trainer.step.FAULTS`, the loss, whether this rank's own loss is finite and
            its state unchanged.
    """

    def __init__(self, step: int, values: Tensor) -> None:
        self.step, self._values = step, values
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The values; waits for the copy, not for what was queued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return list(self._values.tolist())


class Guard:
    """One rank's guard; every rank comes to the same decisions. See :class:`trainer.step.Gate`.

    Args:
        config: what is asked for.
        stepper: of the prepared engine.
        watch: over the state, for changes that nobody made.
        ledger: of the batches that were stepped over.
        log: where alarms and failures go.
    """

    def __init__(
        self, config: GuardConfig, stepper: Stepper, watch: Watch, ledger: Ledger, log: RunLog
    ) -> None:
        self.config, self.watch, self.ledger, self.log = config, watch, ledger, log
        self.engine, self.control = stepper.engine, watch.control
        self.rank = dist.get_rank(self.control)
        self.spikes = Spikes(config.spike_sigma, config.spike_window)
        self.on_host = stepper.device.type == "cpu"
        self._step = 0
        self._facts: _Facts | None = None
        self._unconfirmed: _Facts | None = None
        self._stuck: Tensor | None = None
        self._own_change: Tensor | None = None
        self._finding: Finding | None = None
        self._corruption: Corruption | None = None
        self._tries: Counter[int] = Counter()
        self._blamed: Counter[int | None] = Counter()
        self._rested = 0.0

    def begin(self) -> None:
        """Read the ledger of the run. Collective."""
        entries: list[Any] = [self.ledger.read() if self.rank == 0 else None]
        dist.broadcast_object_list(entries, src=0, group=self.control)
        self.ledger.load(entries[0])

    def loaded(self, step: int) -> None:
        """The state of ``step`` steps was made or loaded, and whoever may write it then has done so."""
        self.watch.begin(step)
        self._rested = time.time()
        self._unconfirmed = self._stuck = None

    def updated(self) -> None:
        """See :class:`trainer.step.Gate`."""
        self.watch.rest(self._step)
        self._rested = time.time()

    def writing(self, step: int) -> AbstractContextManager[None]:
        """Around a cure or a hook that may write weights or optimizer, after ``step`` steps."""
        return self.watch.writing(step)

    def corrupt(self) -> Tensor | None:
        """See :class:`trainer.step.Gate`."""
        self._own_change = self.watch.changed()
        return self._own_change

    def judge(self, totals: Totals, finite: Tensor) -> Tensor | None:
        """See :class:`trainer.step.Gate`."""
        assert totals.faults is not None
        loss = totals.cross_entropy / totals.num_targets
        same = torch.ones_like(finite) if self._own_change is None else ~self._own_change
        values = torch.cat((totals.faults, torch.stack((loss, finite.double(), same.double()))))
        self._facts = _Facts(self._step, values)
        if self.on_host:  # here, where the gradients still show where they went wrong
            self._finding = self._look(self._facts, gradients=True)
            return None if self._finding is None else torch.ones(())
        # A step that nobody looked at yet must not be built upon: what did not commit stays so.
        bad = totals.faults[FAULTS.index("corrupt")] > 0
        if self.config.non_finite:
            bad = bad | (totals.faults.sum() > 0) | ~(loss <= self.spikes.threshold()) | ~torch.isfinite(loss)
        self._stuck = bad if self._stuck is None else bad | self._stuck
        return self._stuck.float()

    def run(self, step: int, batches: list[Batch], attempt: Callable[[], StepResult]) -> StepResult | None:
        """Attempt a step until it commits or its batch is stepped over. Collective.

        Args:
            step: its number; the first is 1.
            batches: this rank's.
            attempt: forward, backward and update on them, any number of times.

        Returns:
            The attempt that was committed; None: the batch was stepped over.

        Raises:
            RollBack: the step must be come to again from an older state.
            NamedFailure: a rank was to blame too often.
            FatalError: the budget of skips is spent.
        """
        if self.ledger.has(step):
            return None
        self._step = step
        self._compare(step, batches[0])
        random = _random_state()
        while True:
            result = attempt()
            facts, waiting = self._facts, self._unconfirmed
            assert facts is not None
            if waiting is not None:
                self.confirm()
            if not self.on_host and not self._tries[step] and not self.spikes.sigma:
                self._unconfirmed = facts
                return result
            finding = self._finding if self.on_host else self._look(facts, gradients=False)
            if finding is None:
                self.spikes.add(facts.read()[len(FAULTS)])
                del self._tries[step]
                return result
            self._stuck = None
            if not self._react(facts.step, finding, again=True):
                return None
            _set_random_state(random)

    def confirm(self) -> None:
        """Make sure that the newest step was committed, before its state is kept or built upon. Collective.

        Raises:
            RollBack: it was not.
        """
        facts, self._unconfirmed = self._unconfirmed, None
        finding = None if facts is None else self._look(facts, gradients=False)
        if facts is not None and finding is not None:
            self._react(facts.step, finding, again=False)

    def _react(self, step: int, finding: Finding, again: bool) -> bool:
        """Decide what is done about a step that did not commit: True: attempt it again; False: it is stepped over.

        Args:
            again: whether it can be attempted again right here.

        Raises:
            RollBack: it is come to again from an older state.
        """
        if self._corruption is not None:
            self._go_back(step, [self._corruption])
        action = list(_ACTIONS)[min(self._tries[step], 2)]
        if action == "redone" and not again:
            self._tries[step], action = 1, "rolled back"
        self._tries[step] += 1
        if action == "stepped over":
            self._check_budget(step, finding)
            self.ledger.add(step, finding.kind, write=self.rank == 0)
        self._say(step, finding, action)
        if action == "rolled back":
            raise RollBack(step - 1, f"step {step} {finding.words}")
        return action == "redone"

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the same on every rank."""
        return {"spikes": self.spikes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; without a state everything begins anew."""
        self.spikes.load_state_dict(state.get("spikes", {}))

    def _compare(self, step: int, batch: Batch) -> None:
        """What is compared between ranks now and then, before the step begins. Collective."""
        found = self.watch.compare(step - 1, batch)
        if found:
            self._go_back(step, found)
        failures = [self._blame(step, finding) for finding in self.watch.settled(step - 1)]
        for failure in filter(None, failures):  # that state is sound
            raise failure

    def _go_back(self, step: int, found: list[Corruption]) -> None:
        failures = [self._blame(step, corruption.finding) for corruption in found]
        sound = min(corruption.sound for corruption in found)
        failure = next(filter(None, failures), None)
        raise RollBack(sound, f"step {step} {found[0].finding.words}", failure)

    def _blame(self, step: int, finding: Finding) -> NamedFailure | None:
        """Write the failure down; what to end in if it is the same rank's again and again."""
        self.log.event(
            "failure",
            step - 1,
            kind="corruption",
            rank=finding.rank,
            host=finding.host,
            cause=finding.what,
            evidence=finding.evidence,
            began=self._rested,
        )
        self._blamed[finding.rank] += 1
        if self._blamed[finding.rank] <= self.config.max_rollbacks:
            return None
        often = f"{self._blamed[finding.rank]} times (guard.max_rollbacks={self.config.max_rollbacks})"
        return NamedFailure("corruption", f"{finding.what}, {often}", finding.rank, finding.host)

    def _look(self, facts: _Facts, gradients: bool) -> Finding | None:
        """What is wrong with a step, if anything is. Collective where something is.

        Args:
            gradients: whether they are still there.
        """
        non_finite, corrupt, loss, finite, same = facts.read()
        self._corruption = self.watch.locate(facts.step, not same) if corrupt else None
        if self._corruption is not None:
            return self._corruption.finding
        if not self.config.non_finite:
            return None
        if non_finite or not math.isfinite(loss):
            return self._locate(loss, bool(finite), gradients)
        threshold = self.spikes.threshold()
        if loss > threshold:
            return Finding("spike", "the loss is far above those before it", loss, threshold)
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
                return Finding("non_finite", "its loss is not finite", loss, None, rank, host)
        for rank, (_, name, host) in enumerate(found):
            if name is not None:
                what = f"its part of the gradient of {name} is not finite"
                return Finding("non_finite", what, loss, None, rank, host)
        return Finding("non_finite", "the gradients' norm is not finite", loss)

    def _check_budget(self, step: int, finding: Finding) -> None:
        for field, used, allowed in (
            ("max_skips_in_a_row", self.ledger.in_a_row_before(step), self.config.max_skips_in_a_row),
            ("max_skips", self.ledger.before(step), self.config.max_skips),
        ):
            if used >= allowed:
                cause = (
                    f"step {step} {finding.words}, again and again on the same batch, and {used} batches were "
                    f"stepped over before it (guard.{field}={allowed})"
                )
                raise FatalError("non-finite", cause, finding.rank, finding.host)

    def _say(self, step: int, finding: Finding, action: str) -> None:
        self.log.event(
            "alarm",
            step,
            kind=finding.kind,
            message=f"step {step} {finding.words}; {_ACTIONS[action]}",
            value=finding.value,
            threshold=finding.threshold,
            rank=finding.rank,
            host=finding.host,
            action=action,
        )


def _random_state() -> tuple[Tensor, Tensor | None]:
    """Of the generators that a model of the user's own may draw from; the project's own draws are counter-based."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def build_guard(
    config: RunConfig,
    dims: ParallelDims,
    stepper: Stepper,
    control: dist.ProcessGroup,
    ledger: Ledger,
    log: RunLog,
) -> Guard | None:
    """What a resolved config asks for; None where that is nothing. Collective.

    Args:
        stepper: of the prepared engine.
        control: a gloo group over all ranks, for small facts.
    """
    guard = config.guard
    if not (guard.non_finite or guard.digest_every or guard.replica_every or guard.replay_every):
        return None
    watch = Watch(config, dims, stepper.engine, control, stepper.loss_of)
    made = Guard(guard, stepper, watch, ledger, log)
    made.begin()
    return made
