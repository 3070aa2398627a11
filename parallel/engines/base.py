"""What every engine offers, and the one view of state that init, checkpoints, digests and proofs share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True)
class StateSlice:
    """This rank's part of one named tensor of the run.

    Over all ranks the slices with ``owner=True`` cover every element of the tensor exactly once, whatever
    the layout; that is what a checkpoint writes and what a digest sums. Slices that are not owned are
    replicas; they must be loaded as well, never written.

    Attributes:
        name: canonical and free of the layout: ``model.layers.0.moe.experts.w1`` for weights and buffers,
            ``optim.exp_avg.layers.0.moe.experts.w1`` for optimizer slots.
        global_shape: the shape in one process.
        offsets: where this slice starts in each dim of ``global_shape``.
        tensor: the local values, detached; writing into it changes the run's state. May be empty.
        owner: whether this rank speaks for these elements.
    """

    name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    tensor: Tensor
    owner: bool


@dataclass(frozen=True)
class Update:
    """All that an optimizer step was given beside weights and optimizer state.

    Attributes:
        lr, skip: as :meth:`Engine.step` was given them.
        gradients: of this rank's parameter slices, after clipping, named ``grad.layers.0.moe.experts.w1``.
        missing: names of the parameters that had none; any tensor of the right shape stands for theirs.
        buffers: the persistent ones as they are now; no step computes them from gradients.
        recipe: what computes, and its settings but for ``lr``: another one would compute another state.
    """

    lr: float
    skip: Tensor | None
    gradients: Sequence[StateSlice]
    missing: frozenset[str]
    buffers: Sequence[StateSlice]
    recipe: str


Replay = Callable[[float, Tensor | None, Mapping[str, Tensor]], None]
"""Given lr, skip and the gradients of a step by parameter, on any device: updates as it did, to the bit."""


@runtime_checkable
class Replayable(Protocol):
    """An engine whose optimizer steps can be done again."""

    keep_updates: bool
    """Whether :meth:`last_update` has something to give."""

    @property
    def can_replay(self) -> bool:
        """Whether its optimizer computes from gradients, state and learning rate alone."""

    def last_update(self) -> Update | None:
        """The step that was done since the last call; None unless it was exactly one."""

    def example_update(self) -> Update:
        """An update that a step may have, with values of no meaning."""

    def replay(self, lr: float, skip: Tensor | None, gradients: Mapping[str, Tensor]) -> None:
        """See :data:`Replay`. No collective."""


def whole_state(model: nn.Module) -> Iterator[StateSlice]:
    """Weights and persistent buffers of a model that one process holds whole."""
    persistent = model.state_dict(keep_vars=True).keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in persistent:
            shape = tuple(tensor.shape)
            yield StateSlice(f"model.{name}", shape, (0,) * len(shape), tensor.detach(), owner=True)


def forget_gathered(model: nn.Module) -> None:
    """Let no gathered parameter outlive a change of the shards that was not an optimizer step.

    FSDP keeps those of the last units between a forward pass without a backward one (an evaluation) and the next.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@runtime_checkable
class Shardable(Protocol):
    """A model that names the modules an engine gathers and frees as a whole."""

    def shard_units(self) -> list[nn.Module]: ...


class Engine(Protocol):
    """Spreads one model over the ranks and steps it. Six methods; one file an engine.

    The gradients that ``finish_backward`` leaves are sums over all target tokens of the step; the caller
    has divided the loss by the global token count and nothing else divides.
    """

    model: nn.Module
    """Set by ``prepare``; call it to run a forward pass."""

    def prepare(self, model: nn.Module) -> None:
        """Shard a model that stands on the meta device and allocate its storage (values undefined)."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradients; ``last`` marks the final micro-batch of the step."""

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Global L2 norm (0-dim, fp32) over every parameter of the model; scales down if above max_norm."""

    def step(self, lr: float, skip: Tensor | None = None) -> None:
        """Optimizer step at this learning rate, then clear the gradients.

        Args:
            skip: 0-dim fp32 on the model's device, equal on all ranks: 1 leaves weights and optimizer as they
                are, to the bit, whatever the gradients hold. None: an ordinary step.
        """

    def named_state(self) -> Iterator[StateSlice]:
        """Weights, persistent buffers and optimizer slots of this rank, in the same order on every call."""

    def named_gradients(self) -> Iterator[StateSlice]:
        """Gradients of this rank's parameter slices, between ``backward`` and ``step``."""
