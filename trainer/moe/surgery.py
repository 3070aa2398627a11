"""Operations on the experts of a live model, optimizer state included, in any layout and under any engine.

Nothing here knows where an expert lives: rows of the engine's named state are copied between ranks
(:mod:`parallel.rows`) and changed in place, with noise that depends on names and global indices only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from parallel.engines.base import Engine, StateSlice
from parallel.rows import RowCopy, copy_rows, rows_here
from trainer.bits import name_key, normal_
from trainer.moe.experts import Experts, SizedExperts
from trainer.moe.layer import MoeLayer
from trainer.moe.router import HierarchicalRouter


@dataclass(frozen=True)
class Stack:
    """Experts of one shape, stacked along dim 0 of each of these weights.

    Attributes:
        names: of the weights, as the model knows them.
        first: the layer's number of the first of them.
        num: experts in it, over all ranks.
    """

    names: tuple[str, ...]
    first: int
    num: int


@dataclass(frozen=True)
class MoeParts:
    """Where a MoE layer keeps its experts and what chooses them.

    Attributes:
        path: of the layer in the model.
        stacks: one, or one a size class.
        gates: weights of the router with a row an expert; none where nothing is learnt.
        bias: the router's bias, if it has one: a number an expert.
        peers: experts ``peers · g … peers · (g + 1) − 1`` are chosen among themselves by a gate of their own.
    """

    path: str
    stacks: tuple[Stack, ...]
    gates: tuple[str, ...]
    bias: str | None
    peers: int

    @property
    def num_experts(self) -> int:
        """Those that have weights."""
        return sum(stack.num for stack in self.stacks)

    def stack_of(self, expert: int) -> Stack:
        """The stack that holds an expert."""
        return next(s for s in self.stacks if s.first <= expert < s.first + s.num)

    def interchangeable(self, one: int, other: int) -> bool:
        """Whether an expert's weights and row of the router mean the same in the other's place."""
        return self.stack_of(one) is self.stack_of(other) and one // self.peers == other // self.peers


def moe_parts(model: nn.Module) -> list[MoeParts]:
    """Every MoE layer of a model, in order; whatever an engine has made of it since."""
    return [_parts(name, module) for name, module in model.named_modules() if isinstance(module, MoeLayer)]


def _parts(path: str, layer: MoeLayer) -> MoeParts:
    router, prefix = layer.router, f"{path}." if path else ""
    experts = layer.experts
    held: list[tuple[str, Experts]] = []
    if isinstance(experts, SizedExperts):
        held = [(f"{prefix}experts.sizes.{i}", size) for i, size in enumerate(experts.sizes)]  # type: ignore[misc]
    elif isinstance(experts, Experts):
        held = [(f"{prefix}experts", experts)]
    stacks, first = [], 0
    for name, stack in held:
        leaves = [leaf for leaf, _ in stack.named_parameters()]
        stacks.append(Stack(tuple(f"{name}.{leaf}" for leaf in leaves), first, stack.num_stacked_experts))
        first += stack.num_stacked_experts
    gated = any(name == "weight" for name, _ in router.named_parameters())
    group = router.num_choosable // router.layout.num_groups
    return MoeParts(
        path=path,
        stacks=tuple(stacks),
        gates=(f"{prefix}router.weight",) if gated else (),
        bias=None if router.bias_E is None else f"{prefix}router.bias_E",
        peers=group if isinstance(router, HierarchicalRouter) else router.num_choosable,
    )


@dataclass(frozen=True)
class Revival:
    """A dead expert's place taken by half of a busy one.

    Attributes:
        dead, busy: numbers in the layer.
    """

    dead: int
    busy: int


@torch.no_grad()
def revive(
    engine: Engine,
    layer: MoeParts,
    revivals: Sequence[Revival],
    control: dist.ProcessGroup,
    *,
    noise: float,
    split: float,
    seed: int,
) -> None:
    """Let dead experts take over weights and router rows of busy ones. Collective, between two steps.

    The busy expert is cut in two, as the busiest codeword is in the LBG algorithm (Linde, Buzo and Gray, IEEE
    Trans. Comm. 28, 1980), which is how dead codes of a vector quantiser are revived:

        router   r → r · (1 + split · z) for the busy one and r · (1 − split · z) for the dead one, z ~ N(0, 1):
                 which of the two a token prefers depends on the side of a plane it is on
        weights  w → w · (1 + noise · z) for the dead one; the busy one keeps its own (sparse upcycling,
                 arXiv:2212.05055, begins with equal copies and lets the router tell them apart)
        bias     the busy one's

    Optimizer: the mean of gradients (``exp_avg``) of both the dead expert and its row becomes 0 as for a
    recycled neuron (ReDo, arXiv:2302.12902), since it would push the copy along the tokens of both. The mean
    of squares (``exp_avg_sq``) is copied: Adam's bias correction looks at the step count of the whole stack,
    so after a zero there the first update would be up to ``(1 − β1) / √(1 − β2)`` times the learning rate,
    for every weight alike. Other slots with a row an expert become 0.

    Noise depends on (seed, name of the tensor, global index), so it is the same in every layout.

    Args:
        revivals: of distinct experts, carried out in order; pairs are :meth:`MoeParts.interchangeable`.
        control: a group over all ranks for small facts.
        noise, split: relative standard deviations.
    """
    for revival in revivals:
        assert layer.interchangeable(revival.dead, revival.busy), "the experts differ in size or group"
        slices = [part for part in engine.named_state() if _concerns(part.name, layer)]
        copies = list(_copies(slices, layer, revival))
        copy_rows(slices, copies, control)
        _forget_momentum(slices, layer, revival)
        for name in layer.stack_of(revival.dead).names:
            row = revival.dead - layer.stack_of(revival.dead).first
            _jitter(slices, f"model.{name}", row, row, noise, seed)
        for name in layer.gates:
            _jitter(slices, f"model.{name}", revival.dead, revival.dead, -split, seed)
            _jitter(slices, f"model.{name}", revival.busy, revival.dead, split, seed)


def _concerns(name: str, layer: MoeParts) -> bool:
    prefix = f"{layer.path}." if layer.path else ""
    return f".{prefix}experts." in name or f".{prefix}router." in name


def _rows(layer: MoeParts, revival: Revival) -> Iterator[tuple[str, int, int]]:
    """(parameter, row of the dead, row of the busy) of all that belongs to an expert."""
    stack = layer.stack_of(revival.dead)
    for name in stack.names:
        yield name, revival.dead - stack.first, revival.busy - stack.first
    for name in layer.gates:
        yield name, revival.dead, revival.busy


def _copies(slices: Sequence[StateSlice], layer: MoeParts, revival: Revival) -> Iterator[RowCopy]:
    here = {part.name for part in slices}
    for name, dead, busy in _rows(layer, revival):
        for key in (f"model.{name}", f"optim.exp_avg_sq.{name}"):
            if key in here:
                yield RowCopy(key, busy, key, dead)
    if layer.bias is not None:
        yield RowCopy(f"model.{layer.bias}", revival.busy, f"model.{layer.bias}", revival.dead)


def _forget_momentum(slices: Sequence[StateSlice], layer: MoeParts, revival: Revival) -> None:
    rows = {name: dead for name, dead, _ in _rows(layer, revival)}
    for part in slices:
        slot, _, name = part.name.removeprefix("optim.").partition(".")
        if part.name.startswith("optim.") and slot != "exp_avg_sq" and name in rows and part.global_shape:
            for _, values in rows_here([part], part.name, rows[name]):
                values.zero_()


def _jitter(
    slices: Sequence[StateSlice], name: str, row: int, drawn_for: int, scale: float, seed: int
) -> None:
    """Multiply a row by ``1 + scale · z``, z drawn as if for the elements of row ``drawn_for``."""
    if not scale:
        return
    key = name_key(f"revival of {name}", seed)
    for part, values in rows_here(slices, name, row):
        z = torch.empty(values.shape, dtype=torch.float32, device=values.device)
        normal_(z, key, part.global_shape, (drawn_for, *part.offsets[1:]))
        values.mul_(z.mul_(scale).add_(1.0))


@torch.no_grad()
def reset_bias(engine: Engine, layer: MoeParts) -> None:
    """Set the bias on a layer's choice back to 0 on every rank (no communication: each has all of it)."""
    assert layer.bias is not None, "the layer has a bias"
    for part in engine.named_state():
        if part.name == f"model.{layer.bias}":
            part.tensor.zero_()
