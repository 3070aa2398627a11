"""One optimizer step: micro-batches in, sums over all ranks out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engines.base import Engine
from parallel.errors import ConfigError
from parallel.exchange_check import ExchangeCheck
from trainer import faults
from trainer.config import RunConfig
from trainer.data.batch import Batch
from trainer.liveness import Pulse
from trainer.models.transformer import Losses
from trainer.moe.replay import replaying
from trainer.optim import learning_rate


@dataclass(frozen=True)
class Totals:
    """Sums of one step (or evaluation) over all ranks and micro-batches.

    Attributes:
        num_targets: target tokens; what every mean below is divided by, once.
        cross_entropy: nats, fp64.
        balance_L, router_z_L, entropy_L, confidence_L: as :class:`trainer.moe.balance.MoeStats`, a value a MoE
            layer.
        dropped_L, unserved_L, sent_L: int64.
        counts_LE: routed pairs of each expert, int64.
        faults: ranks that found something wrong, one count a :data:`FAULTS`, fp64; None of an evaluation.
    """

    num_targets: int
    cross_entropy: Tensor
    balance_L: Tensor
    router_z_L: Tensor
    entropy_L: Tensor
    confidence_L: Tensor
    dropped_L: Tensor
    unserved_L: Tensor
    sent_L: Tensor
    counts_LE: Tensor
    faults: Tensor | None = None

    def mean(self, total: Tensor) -> float:
        """A sum over tokens as a mean a target token (a host sync)."""
        return float(total.sum()) / max(1, self.num_targets)


FAULTS = ("non_finite", "corrupt")
"""What a rank may find wrong in a step: a loss or norm that is not finite; state that changed by itself."""

_PHASES = {"start": "agree", "evaluation": "evaluation", "checkpoint": "checkpoint", "sample": "sample"}
"""Parts of a step by their names → phases with a patience of their own; all others compute."""
_SCALARS = ("balance", "router_z", "entropy", "confidence", "dropped", "unserved", "sent")


class Sums:
    """Adds up micro-batches in fp64 on the device; one all-reduce a step."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._num_layers = 0

    def add(self, losses: Losses) -> None:
        """Count one micro-batch of this rank."""
        self._num_layers = len(losses.moe)
        parts = [losses.cross_entropy.detach().double().reshape(1)]
        for stats in losses.moe:
            parts.append(torch.stack([getattr(stats, name).detach().double() for name in _SCALARS]))
            parts.append(stats.counts_E.double())  # exact up to 2^53 pairs
        packed = torch.cat(parts)
        self._total = packed if self._total is None else self._total + packed

    def finite(self) -> Tensor:
        """Whether this rank's own cross-entropy is, 0-dim bool, no host sync."""
        assert self._total is not None, "a step has at least one micro-batch"
        return torch.isfinite(self._total[0])

    def reduce(self, num_targets: int, faults: Tensor | None = None) -> Totals:
        """Sum over all ranks. Collective.

        Args:
            faults: what this rank found wrong, fp64 ``[len(FAULTS)]``, zeros and ones.
        """
        assert self._total is not None, "a step has at least one micro-batch"
        if faults is not None:
            self._total = torch.cat((self._total, faults))
        dist.all_reduce(self._total)
        flat = self._total[1:]
        if faults is not None:
            flat, faults = flat[: -len(FAULTS)], flat[-len(FAULTS) :]
        num_scalars = len(_SCALARS)
        layers = flat.view(self._num_layers, -1) if self._num_layers else flat.view(0, num_scalars)
        balance, router_z, entropy, confidence, *integers = layers[:, :num_scalars].unbind(1)
        dropped, unserved, sent = (value.long() for value in integers)
        return Totals(
            num_targets=num_targets,
            cross_entropy=self._total[0],
            balance_L=balance,
            router_z_L=router_z,
            entropy_L=entropy,
            confidence_L=confidence,
            dropped_L=dropped,
            unserved_L=unserved,
            sent_L=sent,
            counts_LE=layers[:, num_scalars:].long(),
            faults=faults,
        )


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind. ``stop`` is what the ranks agreed on before it began."""

    totals: Totals
    grad_norm: Tensor
    lr: float
    stop: bool


class Observer(Protocol):
    """Who is shown every micro-batch that goes forward, in steps and in evaluations."""

    def routes(self, batch: Batch) -> Sequence[Tensor] | None:
        """The experts that its tokens go to (:func:`trainer.moe.replay.replaying`); None: the routers choose."""

    def saw(self, batch: Batch, losses: Losses) -> None:
        """It went forward, to these losses. No host sync here."""


class Gate(Protocol):
    """Who decides whether a step commits (:mod:`trainer.guard`)."""

    def corrupt(self) -> Tensor | None:
        """Whether this rank's state changed since its last step, 0-dim bool; None: not looked at. No host sync."""

    def judge(self, totals: Totals, finite: Tensor) -> Tensor | None:
        """``skip`` of :meth:`parallel.engines.base.Engine.step`, the same on every rank. Collective.

        Args:
            totals: of the step, with its faults.
            finite: whether this rank's own loss is.
        """

    def updated(self) -> None:
        """The update is done: until the next one nobody has a right to write weights or optimizer. No host sync."""


class Stepper:
    """Runs optimizer steps of one engine.

    Args:
        engine: prepared.
        config: resolved.
        device: of the model.
        wants_stop: whether this rank was asked to stop; the ranks agree before each step, in the same
            all-reduce that counts the targets.
        check: told which part of which step this rank comes to; None where exchanges are not checked.

    Attributes:
        on_gradients: called between the last backward of a step and clipping.
        observer: None where nobody watches.
        gate: None where every step commits.
        pulse: told what this rank comes to.
        stop_cause: the signal that asked this rank to stop, if one did.
        balance_L: coefficient of the balance loss of each MoE layer; None: as configured.
    """

    def __init__(
        self,
        engine: Engine,
        config: RunConfig,
        device: torch.device,
        wants_stop: Callable[[], bool],
        check: ExchangeCheck | None = None,
    ) -> None:
        self.engine = engine
        self.config = config
        self.device = device
        self.wants_stop = wants_stop
        self.check = check
        self.on_gradients: Callable[[], None] = lambda: None
        self.observer: Observer | None = None
        self.gate: Gate | None = None
        self.pulse = Pulse()
        self.stop_cause: Callable[[], str | None] = lambda: None
        self.balance_L: Sequence[float | Tensor] | None = None

    def train_step(self, step: int, batches: list[Batch]) -> StepResult:
        """Forward, backward, clip and update on this rank's micro-batches of step ``step`` (0-based).

        Gradients are sums over tokens divided once, by the step's target tokens on all ranks, known before
        the first backward. Collective.
        """
        config = self.config
        self.enter("start", step + 1)
        num_targets, stop = self._agree(batches)
        sums = Sums()
        for index, batch in enumerate(batches):
            self.enter(f"micro-batch {index + 1} of {len(batches)}" if len(batches) > 1 else "")
            faults.reach("forward", step)
            losses = self.forward(batch)
            loss = self.objective(losses) / num_targets
            faults.reach("backward", step)
            self.engine.backward(loss, last=index == len(batches) - 1)
            sums.add(losses)
        self.enter("optimizer")
        self.on_gradients()
        faults.reach("before_optimizer", step)
        grad_norm = self.engine.clip_gradients(config.optim.max_grad_norm)
        lr = learning_rate(config.optim, step, config.train.steps)
        if self.gate is None:
            totals, skip = sums.reduce(num_targets), None
        else:
            finite = sums.finite()
            totals = sums.reduce(
                num_targets, _faults(finite & torch.isfinite(grad_norm), self.gate.corrupt())
            )
            skip = self.gate.judge(totals, finite)
        self.engine.step(lr, skip)
        self._after_step(totals.counts_LE, skip)
        if self.gate is not None:
            self.gate.updated()
        faults.reach("after_optimizer", step)
        return StepResult(totals, grad_norm, lr, stop)

    def _after_step(self, counts_LE: Tensor, skip: Tensor | None) -> None:
        """Let the model take in the step's loads, unless the step does not commit (decided on the device)."""
        after_step = getattr(self.engine.model, "after_step", None)
        if after_step is None:
            return
        if skip is None:
            after_step(counts_LE)
            return
        before = [(buffer, buffer.clone()) for buffer in self.engine.model.buffers()]
        after_step(counts_LE)
        for buffer, old in before:
            buffer.copy_(torch.where(skip.bool(), old, buffer))

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Totals:
        """Sums over held-out batches; every rank brings the same number of them. Collective."""
        sums = Sums()
        self.engine.model.eval()
        for index, batch in enumerate(batches):
            self.enter(f"evaluation, batch {index + 1} of {len(batches)}")
            sums.add(self.forward(batch))
        self.engine.model.train()
        num_targets, _ = self._agree(batches)
        return sums.reduce(num_targets)

    @torch.no_grad()
    def loss_of(self, batch: Batch) -> float:
        """Summed cross-entropy of one batch of this rank, shown to nobody (a host sync). Collective."""
        self.enter("replay")
        observer, self.observer = self.observer, None
        self.engine.model.eval()
        loss = float(self.forward(batch).cross_entropy)
        self.engine.model.train()
        self.observer = observer
        return loss

    def forward(self, batch: Batch) -> Losses:
        """Losses of one micro-batch of this rank."""
        batch = batch.to(self.device)
        documents = batch.document_ids if self.config.data.respect_documents else None
        layout = self.config.layout
        noisy = self.engine.model.training and (layout.jitter > 0 or layout.sample_second)
        noise = (batch.sample_ids,) if noisy else ()
        given = None if self.observer is None else self.observer.routes(batch)
        with nullcontext() if given is None else replaying(given):
            found = self.engine.model(batch.tokens, batch.targets, documents, *noise)
        if isinstance(found, Tensor) and found.dim() == 0:  # of a model of the user's own
            found = Losses(found, ())
        if isinstance(found, Losses):
            if self.observer is not None:
                self.observer.saw(batch, found)
            return found
        shape = f" of shape {list(found.shape)}" if isinstance(found, Tensor) else ""
        raise ConfigError(
            "model.target",
            self.config.model.target,
            f"given targets, its forward returned a {type(found).__name__}{shape}",
            "return trainer.models.transformer.Losses, or the summed cross-entropy as a tensor without dims",
        )

    def objective(self, losses: Losses) -> Tensor:
        """Cross-entropy plus weighted auxiliary losses, as a sum over target tokens."""
        weights = self.config.layout.balance
        total = losses.cross_entropy
        for layer, stats in enumerate(losses.moe):
            if self.balance_L is not None:
                total = total + self.balance_L[layer] * stats.balance
            elif weights.coefficient:
                total = total + weights.coefficient * stats.balance
            if weights.router_z:
                total = total + weights.router_z * stats.router_z
        return total

    def enter(self, part: str, step: int | None = None) -> None:
        """This rank comes to another part of the step (None: of the same one), for those who ask where it is."""
        self.pulse.enter(_PHASES.get(part.partition(",")[0], "compute"), step)
        if self.check is not None:
            self.check.enter(part, step)

    def _agree(self, batches: list[Batch]) -> tuple[int, bool]:
        """Target tokens over all ranks, and whether any rank was asked to stop.

        On CPU tensors, so that no device waits for it (batches arrive on the CPU).
        """
        mine = torch.stack([batch.num_targets for batch in batches]).sum()
        agreed = torch.tensor([int(mine), int(self.wants_stop())])
        dist.all_reduce(agreed)
        num_targets, stops = agreed.tolist()
        return max(1, num_targets), stops > 0


def _faults(finite: Tensor, corrupt: Tensor | None) -> Tensor:
    """This rank's ``faults`` for :meth:`Sums.reduce`."""
    return torch.stack([~finite, torch.zeros_like(finite) if corrupt is None else corrupt]).double()
