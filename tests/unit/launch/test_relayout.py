"""The layout of a run on fewer nodes: every rule of a config holds, and the batch is kept."""

from __future__ import annotations

import pytest

from launch.relayout import relayout
from parallel.dims import ParallelDims
from parallel.errors import ConfigError
from tests.configs import composed
from trainer.config import Machine, RunConfig, parallel_dims, resolve
from trainer.rules import validate


def configs(*overrides: str) -> tuple[RunConfig, RunConfig]:
    """What was asked for, and its full layout."""
    small = ["model.dim=48", "model.num_heads=4", "model.ffn_dim=96"]
    asked = composed("device=cpu", "train.num_threads=1", *small, *overrides)
    full = resolve(asked, Machine(num_cpus=2))
    validate(full)
    return asked, full


def layout(config: RunConfig) -> tuple[int, int, int, int, bool]:
    dims: ParallelDims = parallel_dims(config)
    return dims.dp_replicate, dims.dp_shard, dims.ep, config.train.micro_batch, config.train.pad_batch


@pytest.mark.parametrize(
    ("overrides", "nodes", "expected"),
    [
        # ep shrinks to the largest that divides what is left; the micro-batch stays, there are more of them.
        (
            ["launcher.nproc_per_node=2", "parallel.ep=8", "train.global_batch=18", "train.pad_batch=true"],
            3,
            (1, 6, 2, 3, True),
        ),
        (["launcher.nproc_per_node=2", "parallel.ep=8", "train.global_batch=16"], 2, (1, 4, 4, 2, False)),
        (["launcher.nproc_per_node=2", "parallel.ep=2", "train.global_batch=16"], 2, (1, 4, 2, 2, False)),
        (["launcher.nproc_per_node=1", "train.global_batch=12"], 3, (1, 3, 1, 2, False)),
        # Replicas stay where the shards were left blank, and shards where they were fixed.
        (
            ["launcher.nproc_per_node=2", "parallel.dp_replicate=2", "train.global_batch=16"],
            2,
            (2, 2, 1, 2, False),
        ),
        (
            [
                *("launcher.nproc_per_node=2", "parallel.dp_replicate=2", "parallel.dp_shard=4"),
                "train.global_batch=16",
            ],
            2,
            (1, 4, 1, 2, False),
        ),
        # One row too many for three ranks: two are padding.
        (["launcher.nproc_per_node=1", "train.global_batch=16"], 3, (1, 3, 1, 3, True)),
    ],
)
def test_fewer_nodes(overrides: list[str], nodes: int, expected: tuple[object, ...]) -> None:
    asked, full = configs("launcher.nnodes=1:4", "layout=mixtral", *overrides)
    found = relayout(full, asked, nodes)
    assert layout(found) == expected
    validate(found)
    assert found.train.global_batch == full.train.global_batch
    assert found.launcher.nnodes == "1:4" and found.launcher.num_nodes == nodes


def test_all_nodes_have_the_full_layout_again() -> None:
    asked, full = configs("launcher.nnodes=1:4", "train.global_batch=8")
    assert relayout(relayout(full, asked, 1), asked, 4) != full, "a layout is made from the full one only"
    assert relayout(full, asked, 4) == full


def test_where_no_layout_keeps_every_rule_there_is_none() -> None:
    two = ["launcher.nproc_per_node=2", "train.global_batch=8", "model.dim=64", "model.ffn_dim=64"]
    asked, full = configs("launcher.nnodes=1:4", *two)
    with pytest.raises(ConfigError, match="each expert is sharded over"):
        relayout(full, asked, 3)


def test_what_would_train_another_objective_is_refused() -> None:
    asked, full = configs("launcher.nnodes=1:2", "layout=mixtral", "layout.balance.scope=micro")
    with pytest.raises(ConfigError, match="another objective"):
        relayout(full, asked, 1)


def test_a_stream_that_cannot_be_dealt_anew_is_refused() -> None:
    asked, full = configs("launcher.nnodes=1:4", "data=hub", "data.name=a/b", "train.global_batch=8")
    with pytest.raises(ConfigError, match="evenly over dp = 3 ranks"):
        relayout(full, asked, 3)
    assert parallel_dims(relayout(full, asked, 2)).dp == 2


@pytest.mark.parametrize("text", ["0", "2:1", "1:", ":2", "many", "0:2", "-2"])
def test_a_number_of_nodes_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is a number of nodes, at least 1, or MIN:MAX"):
        configs(f"launcher.nnodes='{text}'")
