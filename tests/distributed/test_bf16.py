"""bf16: what is rounded and what is not, under any layout."""

from __future__ import annotations

import pytest

from tests.distributed import cases
from tests.distributed.pool import Pool


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (4, 2)])
def test_norms_and_routers_are_never_rounded(pool: Pool, world: int, ep: int) -> None:
    config = cases.small_config(
        "layout=mixtral",
        "model.qk_norm=head",
        "train.dtype=bf16",
        f"launcher.nproc_per_node={world}",
        f"parallel.ep={ep}",
    )
    for seen in pool.run(cases.dtypes_in_forward, world, config):
        exact = {name for name in seen if "norm" in name or "router" in name}
        assert len(exact) == 2 * 5 + 1
        assert {seen[name] for name in exact} == {"torch.float32"}
        assert seen["layers.0.attention.wq.weight"] == "torch.bfloat16"
        assert seen["layers.0.feed_forward.experts.w1"] == "torch.bfloat16"
        assert seen["masters"] == "torch.float32"


@pytest.mark.parametrize(("recompute", "budget"), [("true", "null"), ("false", "null"), ("false", "30")])
def test_bf16_learns_as_one_process_does(pool: Pool, recompute: str, budget: str) -> None:
    """Not to fp32 tolerance: sums of bf16 products differ in order. The curves stay together."""
    options = ["layout=mixtral", "train.dtype=bf16", f"train.activation_checkpointing={recompute}"]
    one = cases.small_config(*options)
    options.append(f"parallel.max_tokens_in_flight={budget}")
    four = cases.small_config(*options, "launcher.nproc_per_node=4", "parallel.ep=2")
    alone = pool.run(cases.train, 1, one, 6)[0]
    spread = pool.run(cases.train, 4, four, 6)[0]
    assert spread["losses"] == pytest.approx(alone["losses"], rel=5e-3)
    assert spread["norms"] == pytest.approx(alone["norms"], rel=5e-2)
