"""However many rows a rank is sent, its experts get a few at a time, and what is computed is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.one_layer import OneLayer, Sizes, bound
from parallel.dispatch.rounds import num_rounds
from parallel.engines.base import StateSlice
from parallel.errors import ConfigError
from parallel.mesh import build_meshes
from tests.distributed import cases, oracle
from tests.distributed.pool import Pool
from tests.distributed.test_accelerate import Launched
from tests.distributed.test_parity import compare, overrides_of
from tests.grid import grid, some
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.config import RunConfig, parallel_dims
from trainer.models.init import initialise
from trainer.step import Stepper

BUDGET = "parallel.max_tokens_in_flight"
SIZED = ["layout=ernie", "layout.num_experts=12", "layout.first_dense_layers=0"]
SIZED += ["layout.expert_sizes=[{num: 4, ffn_dim: 16}, {num: 8, ffn_dim: 24}]"]
ENGINES: dict[str, tuple[list[str], list[str], int]] = {
    # 37 of about 35 rows: some ranks come to rounds and others do not.
    "deepspeed 2, experts that compute nothing": (
        ["layout=moe_plus_plus"],
        ["engine=deepspeed", "engine.zero_stage=2", "train.micro_batch=1", f"{BUDGET}=37"],
        1,
    ),
    "deepspeed 3, recomputed": (
        ["layout=mixtral"],
        [
            "engine=deepspeed",
            "engine.zero_stage=3",
            "train.activation_checkpointing=true",
            f"{BUDGET}=37",
        ],
        2,
    ),
    "accelerate, capacity": (["layout=gshard"], ["engine=accelerate", f"{BUDGET}=37"], 2),
    "native, experts of two sizes": (SIZED, [f"{BUDGET}=50", "train.micro_batch=1"], 2),
}


@pytest.mark.parametrize(
    "engine", some([*ENGINES], ["deepspeed 3, recomputed", "native, experts of two sizes"])
)
def test_rounds_compute_what_one_process_would(pool: Pool, engine: str) -> None:
    common, own, ep = ENGINES[engine]
    compare(Launched(pool), 4, common, [*own, *overrides_of(4, 1, ep)])


def train_on_expert_0(rank: int, world: int, config: RunConfig) -> dict[str, Any]:
    """Two steps in which every token goes to the first expert: losses, gradients, weights, bytes to other ranks."""
    meshes = build_meshes(parallel_dims(config), "cpu")
    engine = build_engine(config, meshes, torch.device("cpu"))
    engine.prepare(build_model(config, build_dispatcher(meshes, budget=config.parallel.max_tokens_in_flight)))
    initialise(engine.model, engine.named_state(), config.train.seed)
    for name, buffer in engine.model.named_buffers():
        if name.endswith("router.bias_E"):
            buffer[0] = 100.0
    stepper = Stepper(engine, config, torch.device("cpu"), wants_stop=lambda: False)
    gradients: list[Any] = []
    stepper.on_gradients = lambda: gradients.extend(map(whole_slice, engine.named_gradients()))
    share = config.train.global_batch // world
    losses, num_bytes, counts = [], 0, []
    for step in range(2):
        batch = oracle.batch_of_step(config, step)
        totals = stepper.train_step(step, [oracle.rows(batch, rank * share, (rank + 1) * share)]).totals
        losses.append(totals.mean(totals.cross_entropy))
        num_bytes += int(totals.sent_L.sum())
        counts.append(totals.counts_LE)
    assert all(not c[:, 1:].any() for c in counts), "every token goes to expert 0"
    weights = [whole_slice(piece) for piece in engine.named_state()]
    return {
        "losses": losses,
        "bytes": num_bytes,
        "gradients": gradients[: len(gradients) // 2],
        "weights": weights,
    }


def whole_slice(piece: StateSlice) -> tuple[str, Tensor]:
    return piece.name, piece.tensor.clone()


@pytest.mark.parametrize(("ep", "recompute"), grid([2, 4], ["false", "true"]))
def test_all_tokens_to_one_expert(pool: Pool, ep: int, recompute: str) -> None:
    """In rounds: the same losses, gradients and weights as at once; and no other bit when repeated."""
    common = ["layout=deepseek", "layout.top_k=1", "layout.renormalize=false", *overrides_of(4, 1, ep)]
    common.append(f"train.activation_checkpointing={recompute}")
    rows = 2 * 24  # of a rank
    row = 4 * cases.small_config(*common).model.dim
    at_once = pool.run(train_on_expert_0, 4, cases.small_config(*common))
    config = cases.small_config(*common, f"{BUDGET}={rows // 2}")
    first, second = (pool.run(train_on_expert_0, 4, config) for _ in range(2))
    for rounds, again, expected in zip(first, second, at_once, strict=True):
        assert rounds["losses"] == pytest.approx(expected["losses"], rel=1e-6, abs=0.0)
        assert rounds["losses"] == again["losses"]
        extra = 2 * (
            4 + 4
        )  # bytes of a visit beyond four trips: weight and expert, the weight's gradient, rounded
        assert rounds["bytes"] * (4 * row + extra) == expected["bytes"] * 5 * row > 0, (
            "sent again in backward"
        )
        for what in ("gradients", "weights"):
            for found, repeated, wanted in zip(rounds[what], again[what], expected[what], strict=True):
                assert torch.equal(found[1], repeated[1]), f"{what} of {found[0]}"
                torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-7, msg=found[0])


def peaks(rank: int, world: int, skews: list[float], budgets: list[int | None]) -> list[dict[Any, int]]:
    layers = [OneLayer(Sizes(), skew) for skew in skews]
    return [{"rows": layer.most_rows(), **{b: layer.peak(b) for b in budgets}} for layer in layers]


@pytest.mark.parametrize("world", [2, 4])
def test_peak_memory_keeps_to_its_bound_at_every_skew(pool: Pool, world: int) -> None:
    sizes, budget = Sizes(), 256
    allowed = bound(sizes, world, budget)
    ranks = pool.run(peaks, world, [0.0, 0.5, 1.0], [budget, None])
    for rank in ranks:
        assert all(found[budget] <= allowed for found in rank)
    even, hot = ranks[0][0], ranks[0][-1]
    assert hot["rows"] == world * sizes.rows
    assert num_rounds(hot["rows"], budget) == 2 * world
    assert hot[budget] > 0.85 * allowed, "the bound says how much it is, not only how much it is not"
    assert hot[None] > 1.2 * max(even[None], allowed), "without a budget memory grows with the skew"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"{BUDGET}=0"], f"{BUDGET}=0: must be above 0, or null for no bound. Fix: {BUDGET}=null"),
        (
            ["layout=dense", f"{BUDGET}=9"],
            f"{BUDGET}=9: layout=dense has no experts whose rows it could bound",
        ),
    ],
)
def test_a_budget_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cases.small_config(*overrides)
