"""One rank of bench/exchange.py: its contestants, and the rounds in which all ranks take turns together."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.layer_contestant import Contestant, Matmuls, Muster
from bench.layer_peers import Absent, DeepSpeed
from bench.layer_work import (
    LIMITS,
    Answer,
    Shape,
    Weights,
    Work,
    error,
    make_weights,
    make_work,
    normalised,
    truth,
)
from bench.paired import in_turn
from parallel.collectives import exchange_rows
from parallel.dispatch.all_to_all import AllToAllDispatcher
from parallel.dispatch.base import TRIPS, Routing

MUSTER, WIRE, FLOOR = "Muster", "its bytes alone", "floor: matmuls"
SIZES = [1 << n for n in range(12, 25, 2)]
"""Bytes that a rank sends in one all-to-all, its own part among them."""


@dataclass
class Row:
    """One contestant on one world, shape and routing.

    Attributes:
        ms: of the slowest rank in each round; empty where it took no part, and ``note`` says why.
        mb: that leave the busiest rank in a step; None: not known.
    """

    name: str
    ms: list[float] = field(default_factory=list)
    mb: float | None = None
    error: float | None = None
    note: str = ""


@dataclass
class Block:
    """All contestants on one world, shape and routing."""

    world: int
    shape: str
    routing: str
    rows: list[Row]

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


class MusterSpread(Muster):
    """The all-to-all dispatcher, and a rank's share of the experts."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        group = dist.group.WORLD
        assert group is not None
        share = _part(torch.arange(shape.num_experts))
        super().__init__(replace(shape, num_experts=len(share)), Weights(*(w[share] for w in weights)))
        self.dispatcher, self.num_experts = AllToAllDispatcher(group), shape.num_experts
        self.num_bytes = 0

    def forward(self, work: Work) -> Tensor:
        x, weight = self.leaves
        y, num_bytes = self.dispatcher.run(x, Routing(work.expert_TK, weight, self.num_experts), self.experts)
        self.num_bytes = int(num_bytes)
        return y


class DeepSpeedSpread(DeepSpeed):
    """``deepspeed.moe.layer.MoE`` with as many ep ranks as there are processes, no token dropped."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        world = dist.get_world_size()
        try:
            deepspeed = importlib.import_module("deepspeed")
        except ImportError as found:
            raise Absent(f"not installed ({found})") from found
        with redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
            super().__init__(shape, weights, drop=False, ep_size=world, ep_rank=dist.get_rank())
            self.module.set_deepspeed_parallelism()


class Wire(Contestant):
    """The fewest bytes that such a step can send: a token once to each other rank of its choice, on each trip."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(torch.nn.Module())
        self.shape = shape

    def prepare(self, work: Work) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        owner_TK = torch.div(work.expert_TK, self.shape.num_experts // world, rounding_mode="floor")
        goes_TR = torch.zeros(len(owner_TK), world, dtype=torch.int64).scatter_(1, owner_TK, 1)
        goes_TR[:, rank] = 0
        send = goes_TR.sum(0)
        recv = torch.empty_like(send)
        dist.all_to_all_single(recv, send)
        self.send, self.recv = send.tolist(), recv.tolist()
        self.rows_there = torch.randn(sum(self.send), self.shape.dim)
        self.rows_back = torch.randn(sum(self.recv), self.shape.dim)
        self.num_bytes = TRIPS * self.rows_there.numel() * self.rows_there.element_size()

    def step(self, work: Work) -> Tensor:
        group = dist.group.WORLD
        assert group is not None
        for _ in range(TRIPS // 2):
            exchange_rows(self.rows_there, self.send, self.recv, group, None)
            exchange_rows(self.rows_back, self.recv, self.send, group, None)
        return self.rows_there


class OwnMatmuls(Contestant):
    """The products of the rows that a rank's experts get, all as if of one expert; all ranks at once."""

    def __init__(self, shape: Shape, weights: Weights) -> None:
        super().__init__(torch.nn.Module())
        self.shape, self.weights = shape, weights

    def prepare(self, work: Work) -> None:
        counts = torch.bincount(work.expert_TK.flatten(), minlength=self.shape.num_experts)
        dist.all_reduce(counts)
        rows = int(_part(counts).sum())
        self.inner = Matmuls(replace(self.shape, tokens=rows, top_k=1), self.weights, torch.float32)
        x = torch.randn(rows, self.shape.dim)
        self.inner.prepare(Work(x, x, work.expert_TK, work.weight_TK))

    def step(self, work: Work) -> Tensor:
        return self.inner.step(work)


def _part(whole: Tensor) -> Tensor:
    """This rank's neighbouring rows."""
    return whole.chunk(dist.get_world_size())[dist.get_rank()]


def own_work(work: Work) -> Work:
    return Work(*(_part(t).contiguous() for t in (work.x_TD, work.dy_TD, work.expert_TK, work.weight_TK)))


def own_answer(right: Answer) -> Answer:
    tokens = (_part(t) for t in (right.y_TD, right.dx_TD, right.dweight_TK))
    return Answer(*tokens, Weights(*(_part(w) for w in right.dweights)))


def contestants(shape: Shape, weights: Weights) -> dict[str, Callable[[], Contestant]]:
    return {
        MUSTER: lambda: MusterSpread(shape, weights),
        "DeepSpeed MoE, no drop": lambda: DeepSpeedSpread(shape, weights),
        WIRE: lambda: Wire(shape),
        FLOOR: lambda: OwnMatmuls(shape, weights),
    }


def measure(shape: Shape, routing: str, rounds: int) -> Block:
    """Collective. The same on every rank."""
    weights = make_weights(shape, torch.float32, "cpu")
    whole = make_work(shape, torch.float32, routing, 0, "cpu")
    right, work = truth(whole, weights), own_work(whole)
    block = Block(dist.get_world_size(), shape.name, routing, [])
    ready: dict[str, Contestant] = {}
    for name, build in contestants(shape, weights).items():
        row = Row(name)
        block.rows.append(row)
        try:
            contestant = build()
            if name not in (WIRE, FLOOR):
                _judge(row, contestant, work, right, whole)
            contestant.release()
            ready[name] = contestant
        except Absent as why:
            row.note = str(why)
    seconds = _take_turns(ready, shape, routing, rounds)
    for row in block.rows:
        row.ms = [round(1000 * one, 3) for one in seconds.get(row.name, [])]
        if row.name in ready and hasattr(ready[row.name], "num_bytes"):
            row.mb = _most(float(ready[row.name].num_bytes)) / 1e6
    return block


def _judge(row: Row, contestant: Contestant, work: Work, right: Answer, whole: Work) -> None:
    wanted = own_answer(normalised(right, whole) if contestant.normalises else right)
    row.error = _most(error(contestant.answer(work), wanted)[0])
    if not row.error <= LIMITS[torch.float32]:
        row.note = f"WRONG by {row.error:.1g}"


def _most(value: float) -> float:
    """Of all ranks."""
    most = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return float(most)


def _take_turns(
    ready: dict[str, Contestant], shape: Shape, routing: str, rounds: int
) -> dict[str, list[float]]:
    """Seconds of the slowest rank in each round after one that warms them up; all begin together."""
    works: dict[int, Work] = {}

    def before(index: int, name: str) -> None:
        if index not in works:
            works.clear()
            works[index] = own_work(make_work(shape, torch.float32, routing, index, "cpu"))
        for contestant in ready.values():
            contestant.release()
        ready[name].prepare(works[index])
        dist.barrier()

    def turn(name: str) -> Callable[[], object]:
        return lambda: ready[name].step(next(iter(works.values())))

    seconds = in_turn({name: turn(name) for name in ready}, 1 + rounds, before=before)
    slowest = torch.tensor([values[1:] for values in seconds.values()], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return dict(zip(seconds, slowest.tolist(), strict=True))


def bandwidth(repeats: int) -> list[dict[str, Any]]:
    """An all-to-all of every size: PyTorch's own and Muster's; a barrier and a plain copy beside it. Collective."""
    group, world = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    found = []
    for size in SIZES:
        rows = torch.zeros(size // (4 * world) * world, 1)
        out, splits = torch.empty_like(rows), [len(rows) // world] * world
        turns: dict[str, Callable[[], object]] = {
            "all_to_all_single": lambda rows=rows, out=out: dist.all_to_all_single(out, rows),
            "Muster": lambda rows=rows, splits=splits: exchange_rows(rows, splits, splits, group, None),
            "copy": lambda rows=rows, out=out: out.copy_(rows),
            "barrier": dist.barrier,
        }
        seconds = in_turn(turns, 3 + repeats, before=lambda index, name: dist.barrier())
        line = {name: _most(median(values[3:])) * 1e6 for name, values in seconds.items()}
        found.append({"world": world, "bytes": size, **{name: round(us, 1) for name, us in line.items()}})
    return found
