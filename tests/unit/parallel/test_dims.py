"""ParallelDims: arithmetic and the text of its errors."""

import pytest

from parallel.dims import ParallelDims
from parallel.errors import ConfigError


def test_fills_the_world() -> None:
    dims = ParallelDims.create(16, dp_replicate=2, ep=4)
    assert (dims.dp_shard, dims.expert_shard, dims.dp) == (8, 2, 16)
    assert dims.dense_shape == (1, 2, 8, 1, 1)
    assert dims.sparse_shape == (1, 2, 2, 4)
    assert str(dims) == "dp_replicate 2 × dp_shard 8 × ep 4"


def test_both_views_number_the_same_ranks() -> None:
    dims = ParallelDims.create(16, dp_replicate=2, ep=4)
    for rank in range(16):
        dense, sparse = dims.dense_coordinate(rank), dims.sparse_coordinate(rank)
        assert dense["dp_replicate"] == sparse["dp_replicate"]
        assert dense["dp_shard"] == sparse["expert_shard"] * 4 + sparse["ep"]
    assert sorted(dims.dp_rank(rank) for rank in range(16)) == list(range(16))


def test_sixteen_thousand_ranks_need_no_torch() -> None:
    dims = ParallelDims.create(16_384, dp_replicate=8, ep=64)
    assert dims.expert_shard == 32
    assert dims.sparse_coordinate(16_383) == {"pp": 0, "dp_replicate": 7, "expert_shard": 31, "ep": 63}


@pytest.mark.parametrize(
    ("degrees", "field", "relation", "fix"),
    [
        ({"ep": 3}, "parallel.ep", "dp_shard·cp·tp = 8, which it must divide", "parallel.ep=2"),
        ({"ep": 16}, "parallel.ep", "must divide", "parallel.ep=8"),
        ({"ep": 0}, "parallel.ep", "at least 1", "ep=1"),
        ({"dp_replicate": 3}, "parallel.dp_replicate", "not divisible", "parallel.dp_replicate=2"),
        ({"dp_shard": 3}, "parallel.dp_shard", "must equal the world of 8", "parallel.dp_shard=8"),
        ({"dp_shard": 0}, "parallel.dp_shard", "-1 to fill the world", "dp_shard=-1"),
        ({"tp": 2}, "parallel.tp", "tp is reserved", "parallel.tp=1"),
        ({"pp": 2}, "parallel.pp", "pp is reserved", "parallel.pp=1"),
        ({"cp": 4}, "parallel.cp", "cp is reserved", "parallel.cp=1"),
    ],
)
def test_errors_name_field_rule_and_nearest_value(degrees: dict, field: str, relation: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelDims.create(8, **degrees)
    error = caught.value
    assert error.field == field
    assert error.value == next(iter(degrees.values()))
    assert relation in error.relation
    assert error.fix.startswith(fix)
