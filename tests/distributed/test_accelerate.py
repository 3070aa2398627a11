"""engine=accelerate computes what one process would, shares checkpoints with native, and refuses the rest."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.distributed import cases
from tests.distributed.pool import Pool
from tests.distributed.test_parity import CASES, compare, overrides_of
from trainer.checkpoint.digest import combine
from trainer.checkpoint.resume import newest_valid
from trainer.config import RunConfig, Sharding

ENGINE = "engine=accelerate"


class Launched:
    """The pool, with the variables on its ranks that every launcher sets and Accelerate reads."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def run(self, function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
        return self.pool.run(as_launched, world, function.__module__, function.__name__, *args)


def as_launched(rank: int, world: int, module: str, name: str, *args: Any) -> Any:
    size = str(world)
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with patch.dict(os.environ, variables):
        return getattr(importlib.import_module(module), name)(rank, world, *args)


@pytest.fixture
def ranks(pool: Pool) -> Launched:
    return Launched(pool)


VARIATIONS = {
    "accumulation": (["layout=mixtral"], ["train.micro_batch=1"]),
    "activation checkpointing": (
        ["layout=deepseek"],
        ["train.activation_checkpointing=true", "train.micro_batch=2"],
    ),
    "tied embeddings, capacity": (["model.tied_embeddings=true", "layout.capacity_factor=0.7"], []),
    "every second layer, odd sizes": (
        ["layout.moe_every=2", "model.ffn_dim=44", "layout.num_experts=12"],
        [],
    ),
    "odd expert width": (["layout=switch", "layout.expert_ffn_dim=37"], []),
}


@pytest.mark.parametrize(("layout", "world", "dp_replicate", "ep"), CASES)
def test_computes_what_one_process_would(
    ranks: Launched, layout: str, world: int, dp_replicate: int, ep: int
) -> None:
    compare(ranks, world, [f"layout={layout}"], [ENGINE, *overrides_of(world, dp_replicate, ep)])


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize(("dp_replicate", "ep"), [(1, 1), (1, 2), (2, 2)])
def test_variation_computes_what_one_process_would(
    ranks: Launched, variation: str, dp_replicate: int, ep: int
) -> None:
    common, own = VARIATIONS[variation]
    if not any(o.startswith("layout=") for o in common):
        common = ["layout=mixtral", *common]
    compare(ranks, 4, common, [ENGINE, *own, *overrides_of(4, dp_replicate, ep)])


def sharded(rank: int, world: int, config: RunConfig, steps: int) -> dict[str, Any]:
    """Train through Accelerate's FSDP2 plugin, which it only takes for GPUs: gloo passes for their backend."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    config.engine.sharding = Sharding.fsdp2
    kind = ("gloo", DistributedType.MULTI_GPU)
    with (
        patch.object(PartialState, "_prepare_backend", lambda *_: kind),
        patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": "cpu"}),
    ):
        return cases.train(rank, world, config, steps)


class Sharded(Launched):
    def run(self, function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
        return super().run(sharded, world, *args)


@pytest.mark.parametrize(
    ("layout", "world", "dp_replicate", "ep"),
    [
        ("dense", 4, 2, 1),
        ("mixtral", 2, 1, 2),
        ("mixtral", 4, 1, 2),
        ("deepseek", 4, 2, 2),
        ("switch", 4, 1, 1),
    ],
)
def test_the_fsdp2_plugin_computes_what_one_process_would(
    pool: Pool, layout: str, world: int, dp_replicate: int, ep: int
) -> None:
    own = [ENGINE, "train.micro_batch=1", *overrides_of(world, dp_replicate, ep)]
    compare(Sharded(pool), world, [f"layout={layout}"], own)


def config_of(engine: str, world: int, dp_replicate: int, ep: int, *more: str) -> RunConfig:
    mesh = overrides_of(world, dp_replicate, ep)
    return cases.small_config("layout=deepseek", f"engine={engine}", *mesh, *more)


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2)])
def test_the_loss_curve_is_that_of_native(ranks: Launched, world: int, ep: int) -> None:
    curves = [
        ranks.run(cases.train, world, config_of(engine, world, 1, ep, "train.steps=20"), 20)[0]["losses"]
        for engine in ("native", "accelerate")
    ]
    assert len(curves[0]) == 20
    assert curves[1] == pytest.approx(curves[0], rel=1e-5, abs=0.0)
    assert min(curves[0]) < curves[0][0]


def test_a_checkpoint_goes_from_engine_to_engine_without_a_changed_bit(
    ranks: Launched, tmp_path: Path
) -> None:
    def visit(engine: str, mesh: tuple[int, int, int], steps: int, start: int) -> str:
        config = config_of(engine, *mesh)
        answers = ranks.run(cases.train_with_checkpoints, mesh[0], config, steps, str(tmp_path), start)
        return combine(answer["digest"] for answer in answers)

    trained = visit("accelerate", (4, 2, 2), 3, 0)
    first = newest_valid(tmp_path)
    assert first is not None and first.weights_digest == trained
    for engine, mesh in (("native", (4, 1, 4)), ("accelerate", (4, 1, 2)), ("native", (1, 1, 1))):
        assert visit(engine, mesh, 3, 3) == trained
    on_native = visit("native", (2, 1, 2), 6, 3)
    for engine, mesh in (("accelerate", (2, 1, 1)), ("accelerate", (4, 4, 1)), ("native", (4, 1, 4))):
        assert visit(engine, mesh, 6, 6) == on_native
    again = newest_valid(tmp_path)
    assert again is not None and again.tensors.keys() == first.tensors.keys()


def test_every_optimizer_slot_survives_the_way_back(ranks: Launched, tmp_path: Path) -> None:
    """The same steps with and without a stay under native in between."""
    there = str(tmp_path / "there")
    mesh = (4, 2, 2)
    ranks.run(cases.train_with_checkpoints, 4, config_of("accelerate", *mesh), 3, there, 0)
    ranks.run(cases.train_with_checkpoints, 2, config_of("native", 2, 1, 2), 3, there, 3)
    back = ranks.run(cases.train_with_checkpoints, 4, config_of("accelerate", *mesh), 6, there, 3)
    straight = str(tmp_path / "straight")
    stayed = ranks.run(cases.train_with_checkpoints, 4, config_of("accelerate", *mesh), 6, straight, 0)
    assert combine(a["digest"] for a in back) == combine(a["digest"] for a in stayed)
    saved = [newest_valid(Path(folder)) for folder in (there, straight)]
    assert saved[0] is not None and saved[1] is not None
    assert saved[0].trainer == saved[1].trainer
