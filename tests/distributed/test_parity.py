"""Any layout computes what one process would: loss, gradients, clip norm, routing, weights."""

from __future__ import annotations

import shutil
from functools import cache

import pytest
import torch

from tests.distributed import cases
from tests.distributed.oracle import Trace, run_oracle
from tests.distributed.pool import Pool
from tests.grid import grid, some

LAYOUTS = ["dense", "switch", "mixtral", "deepseek"]
STEPS = 5


def meshes(world: int, layout: str) -> list[tuple[int, int, int]]:
    """Every legal (world, dp_replicate, ep)."""
    legal = []
    for dp_replicate in (n for n in (1, 2, 4) if world % n == 0):
        dp_shard = world // dp_replicate
        eps = [n for n in (1, 2, 4) if dp_shard % n == 0] if layout != "dense" else [1]
        legal += [(world, dp_replicate, ep) for ep in eps]
    return legal


CASES = [(layout, *mesh) for layout in LAYOUTS for world in (1, 2, 4) for mesh in meshes(world, layout)]
SHORT = [case for case in CASES if case[0] == "mixtral"]  # every mesh
SHORT += [("dense", 4, 2, 1), ("switch", 4, 1, 2), ("deepseek", 2, 1, 2), ("deepseek", 4, 2, 2)]
OTHER_LAYOUTS = {
    "gshard": [],
    "qwen3_moe": [],
    "olmoe": ["layout.num_experts=16"],
    "hierarchical": ["layout.num_experts=8"],
    "expert_choice": [
        *("layout.capacity_factor=0.7", "layout.renormalize=true", "layout.balance.coefficient=0")
    ],
    "ernie": ["layout.num_experts=12", "layout.expert_sizes=[{num: 8, ffn_dim: 24}, {num: 4, ffn_dim: 48}]"],
    "skywork": ["layout.num_experts=8"],
    "moe_plus_plus": ["layout.jitter=0.1"],
    "hash": ["layout.top_k=2", "layout.balance.coefficient=0", "layout.balance.router_z=0"],
    "sinkhorn": ["layout.top_k=2", "layout.drop_by=score", "layout.capacity_factor=0.8"],
    "deepseek": ["layout.balance.bias_update=proportional", "layout.shared_gate=true", "layout.jitter=0.1"],
}
"""Those whose routing and experts are of a kind that the grid above does not have."""
UNLIKE = [
    "layout=ernie",
    "layout.num_experts=12",
    "layout.expert_sizes=[{num: 8, ffn_dim: 24}, {num: 4, ffn_dim: 48}]",
    "layout.num_zero_experts=1",
    "layout.num_copy_experts=1",
    "layout.shared_gate=true",
    "layout.balance.scope=step",
]
"""Experts of two sizes, some that compute nothing, a gate and a load to remember: for the other engines."""


@cache
def reference(overrides: tuple[str, ...]) -> Trace:
    torch.set_num_threads(1)
    return run_oracle(cases.small_config(*overrides), STEPS)


def overrides_of(world: int, dp_replicate: int, ep: int) -> list[str]:
    return [
        f"launcher.nproc_per_node={world}",
        f"parallel.dp_replicate={dp_replicate}",
        f"parallel.ep={ep}",
    ]


def compare(pool: Pool, world: int, common: list[str], layout: list[str]) -> None:
    expected = reference(tuple(common))
    traces = pool.run(cases.train, world, cases.small_config(*common, *layout), STEPS)
    for trace in traces:
        assert trace["counts"] == expected.counts, "routed counts"
        assert trace["losses"] == pytest.approx(expected.losses, rel=1e-6, abs=0.0)
        assert trace["norms"] == pytest.approx(expected.norms, rel=1e-5, abs=0.0)
    assert min(expected.norms) > 0.5, "the test must clip"
    for what in ("gradients", "weights"):
        found = cases.assemble([trace[what] for trace in traces])
        wanted = getattr(expected, what)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            if not value.is_floating_point():
                assert torch.equal(found[name], value), f"{what} of {name}"
                continue
            deviation = torch.linalg.vector_norm(found[name] - value) / torch.linalg.vector_norm(value)
            assert deviation <= 1e-5, f"{what} of {name}: ‖a − b‖ / ‖b‖ = {deviation:.2e}"


@pytest.mark.parametrize(("layout", "world", "dp_replicate", "ep"), some(CASES, SHORT))
def test_layout_computes_what_one_process_would(
    pool: Pool, layout: str, world: int, dp_replicate: int, ep: int
) -> None:
    compare(pool, world, [f"layout={layout}"], overrides_of(world, dp_replicate, ep))


@pytest.mark.parametrize(
    ("layout", "world", "dp_replicate", "ep"), grid(OTHER_LAYOUTS, [(2, 1, 1), (4, 2, 2), (4, 1, 4)])
)
def test_every_other_layout_computes_what_one_process_would(
    pool: Pool, layout: str, world: int, dp_replicate: int, ep: int
) -> None:
    common = [f"layout={layout}", *OTHER_LAYOUTS[layout]]
    compare(pool, world, common, overrides_of(world, dp_replicate, ep))


VARIATIONS = {
    "accumulation": ["train.micro_batch=1"],
    "activation checkpointing": ["train.activation_checkpointing=true", "train.micro_batch=2"],
    "keep gathered": ["engine.reshard_after_forward=false"],
    "no document mask": ["data.respect_documents=false"],
    "tied embeddings": ["model.tied_embeddings=true"],
    "bounded rows": ["parallel.max_tokens_in_flight=37"],  # of 96 rows on average: 3 rounds and more
    "bounded rows, recomputed": ["parallel.max_tokens_in_flight=37", "train.activation_checkpointing=true"],
    "gelu, norms of heads, wsd": [
        "model.activation=gelu",
        "model.qk_norm=head",
        "optim=wsd",
        "optim.decay_steps=3",
        "optim.warmup_steps=1",
    ],
    "capacity with two choices": ["layout.capacity_factor=0.7"],
    "latent attention, group-limited": [
        "model.attention=mla",
        "model.mla={q_lora_rank: 24, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 8}",
        "layout=deepseek",
        "layout.num_groups=4",
        "layout.top_groups=2",
    ],
    "every second layer, odd sizes": ["layout.moe_every=2", "model.ffn_dim=44", "layout.num_experts=12"],
}
LAYOUT_ONLY = (
    "accumulation",
    "activation checkpointing",
    "keep gathered",
    "bounded rows",
    "bounded rows, recomputed",
)


@pytest.mark.parametrize(("variation", "dp_replicate", "ep"), grid(VARIATIONS, [(1, 2), (1, 4), (2, 2)]))
def test_variation_computes_what_one_process_would(
    pool: Pool, variation: str, dp_replicate: int, ep: int
) -> None:
    overrides = VARIATIONS[variation]
    common, layout = (["layout=mixtral"], overrides) if variation in LAYOUT_ONLY else (overrides, [])
    compare(pool, 4, common, [*layout, *overrides_of(4, dp_replicate, ep)])


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_compiled_blocks_compute_what_one_process_would(pool: Pool) -> None:
    compare(pool, 2, ["layout=mixtral"], ["train.compile=true", *overrides_of(2, 1, 2)])
