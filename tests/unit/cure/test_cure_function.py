"""What a revival changes about what a layer computes: the load of the busy expert in two, the function little."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench.cure import forced_rows
from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import StateSlice, whole_state
from tests.configs import composed
from trainer.config import Machine, resolve
from trainer.moe.layer import MoeLayer
from trainer.moe.positions import Positions
from trainer.moe.surgery import Revival, moe_parts, revive

DIM = 64
SWITCH = ["layout=switch", "layout.capacity_factor=null"]
POSITIONS = Positions(torch.ones(8, DIM), torch.zeros(8, DIM, dtype=torch.int64), None)


class Whole:
    """An engine of one process, as far as surgery asks for one."""

    def __init__(self, model: MoeLayer) -> None:
        self.model = model

    def named_state(self) -> Iterator[StateSlice]:
        return whole_state(self.model)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dist.ProcessGroup]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "s"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def revived(
    control: dist.ProcessGroup, overrides: list[str], scale: float, split: float, pairs: list[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor, list[int], list[int]]:
    """Outputs before and after of a layer that uses its first 2·k experts only, the weight that a token's first
    choice had, and the loads before and after."""
    config = resolve(
        composed("device=cpu", f"model.dim={DIM}", f"model.ffn_dim={DIM}", *overrides), Machine(2)
    )
    torch.manual_seed(0)
    layer = MoeLayer(config, LocalDispatcher())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(8, DIM, DIM)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        weight = layer.router.weight
        weight.copy_(forced_rows("w", tuple(weight.shape), 2 * config.layout.top_k, scale))
        first = layer.router(x, POSITIONS).routing.weight_TK[:, 0]
        before, stats = layer(x, POSITIONS)
        revivals = [Revival(dead, busy) for dead, busy in pairs]
        revive(Whole(layer), moe_parts(layer)[0], revivals, control, noise=0.0, split=split, seed=1)  # type: ignore[arg-type]
        after, stats_after = layer(x, POSITIONS)
    return before, after, first, stats.counts_E.tolist(), stats_after.counts_E.tolist()


def change(before: Tensor, after: Tensor) -> float:
    return float(torch.linalg.vector_norm(after - before) / torch.linalg.vector_norm(before))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_load_of_a_busy_expert_is_halved(alone: dist.ProcessGroup, score: str) -> None:
    pairs = [(6, 0), (7, 1)]
    *_, loads, halves = revived(alone, [*SWITCH, f"layout.score={score}"], 6.0, 0.1, pairs)
    assert loads[2:] == [0] * 6
    assert halves[2:6] == [0] * 4 and sum(halves) == sum(loads)
    for dead, busy in pairs:
        assert halves[dead] + halves[busy] == pytest.approx(loads[busy], rel=0.02)
        assert 0.35 < halves[dead] / loads[busy] < 0.65


def test_sigmoid_scores_of_copies_stand_alone(alone: dist.ProcessGroup) -> None:
    """One of two equal copies answers with the weight that the busy expert had: nothing changes."""
    before, after, *_ = revived(alone, [*SWITCH, "layout.score=sigmoid"], 2.0, 1e-6, [(6, 0), (7, 1)])
    assert change(before, after) < 1e-5


def test_softmax_scores_of_copies_are_shared(alone: dist.ProcessGroup) -> None:
    """A weight p becomes p / (1 + p) where the copies tie, which is why the rows are told apart at once."""
    before, after, weight, *_ = revived(alone, SWITCH, 2.0, 1e-7, [(6, 0), (7, 1)])
    assert change(before, after) > 0.2
    told_apart = change(*revived(alone, SWITCH, 2.0, 0.1, [(6, 0), (7, 1)])[:2])
    assert told_apart < 0.9 * change(before, after)
    ratio = torch.linalg.vector_norm(after, dim=-1) / torch.linalg.vector_norm(before, dim=-1)
    assert bool((ratio.flatten() > 1 / (1 + weight) - 1e-4).all()), "never less than the tie leaves"


@pytest.mark.parametrize("scale", [6.0, 16.0])
def test_two_of_k_copies_cost_little(alone: dist.ProcessGroup, scale: float) -> None:
    """Both copies may be among the k, at the price of the k-th other. Renormalised, what is lost is the k-th's
    weight; a larger split loses more, since it moves the scores themselves."""
    pairs = [(4, 0), (5, 1), (6, 2), (7, 3)]
    default = change(*revived(alone, ["layout=mixtral"], scale, 0.1, pairs)[:2])
    wide = change(*revived(alone, ["layout=mixtral"], scale, 1.0, pairs)[:2])
    assert default < 0.25 < 2 * default < wide
