"""The cost of every layout against PyTorch's own counter of FLOPs, and by hand where it is simple."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from tests.configs import composed
from trainer.build import build_model
from trainer.compose import CONF_DIR
from trainer.config import Machine, RunConfig, resolve
from trainer.config_moe import LayoutConfig, RouterName
from trainer.models.cost import (
    all_to_all_bytes_per_token,
    answered_share,
    model_cost,
    num_choosable,
    places_reached,
    rank_of_experts,
    ranks_visited,
)
from trainer.models.init import initialise
from trainer.models.layers import RMSNorm
from trainer.models.transformer import is_moe_layer
from trainer.moe.replay import replaying
from trainer.rules import validate

LAYOUTS = sorted(path.stem for path in Path(CONF_DIR, "layout").glob("*.yaml"))
MORE = {
    "shared gate": ["layout=deepseek", "layout.shared_gate=true"],
    "capacity below the choices": ["layout=gshard", "layout.capacity_factor=0.5"],
    "zero and copy experts with a capacity": ["layout=moe_plus_plus", "layout.capacity_factor=1.0"],
    "every second layer": ["layout=mixtral", "layout.moe_every=2"],
    "without a gate": ["layout=switch", "model.activation=relu"],
    "latent attention": ["layout=mixtral", "model.attention=mla"]
    + [f"model.mla.{k}={v}" for k, v in (("q_lora_rank", 12), ("kv_lora_rank", 8), ("v_head_dim", 4))]
    + ["model.mla.qk_nope_head_dim=6", "model.mla.qk_rope_head_dim=2"],
    "one table for both ends": ["layout=dense", "model.tied_embeddings=true"],
}
CASES = {**{name: [f"layout={name}"] for name in LAYOUTS}, **MORE}
SMALL = [
    *("device=cpu", "model.dim=16", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1"),
    *("model.ffn_dim=32", "data.tokenizer.vocab_size=264", "train.global_batch=2", "train.num_threads=1"),
]


@cache
def config_of(*overrides: str) -> RunConfig:
    """A small one whose rows are long enough for an even choice to exist."""
    asked = composed(*SMALL, *overrides)
    asked.train.seq_len = 2 * max(8, num_choosable(asked.layout))
    config = resolve(asked, Machine(num_cpus=1))
    validate(config)
    return config


def even_choices(config: RunConfig, batch: int) -> list[Tensor]:
    """For each MoE layer choices ``[B, S, K]`` that fall equally often on everything that can be chosen."""
    layout, length = config.layout, config.train.seq_len
    num_layers = sum(is_moe_layer(config, i) for i in range(config.model.num_layers))
    choices = torch.arange(batch * length * layout.top_k) % max(1, num_choosable(layout))
    return [choices.view(batch, length, layout.top_k)] * num_layers


def grouped_mm_flops(x: torch.Size, w: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Rows by group times its matrix, or (in backward) a matrix a group from its rows: each row counts once."""
    return 2 * x[-2] * x[-1] * w[-1]


def added_mm_flops(_: torch.Size, a: torch.Size, b: torch.Size, out_shape: torch.Size, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


UNKNOWN = {torch.ops.aten._grouped_mm: grouped_mm_flops, torch.ops.aten.addmm_: added_mm_flops}
"""To PyTorch's counter."""


def counted_flops(model: nn.Module, config: RunConfig) -> dict[str, int]:
    """FLOPs of one forward and backward by kind of operation; attention in plain matrix products."""
    tokens = torch.randint(0, 264, (2, config.train.seq_len))
    counter = FlopCounterMode(display=False, custom_mapping=UNKNOWN)
    choices = even_choices(config, 2)
    if config.layout.router is RouterName.expert_choice:  # even by itself, whatever its scores
        with counter, sdpa_kernel(SDPBackend.MATH):
            model(tokens, tokens).cross_entropy.backward()
    else:
        with counter, sdpa_kernel(SDPBackend.MATH), replaying(choices):
            model(tokens, tokens).cross_entropy.backward()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Others are not counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    config = config_of(*CASES[name])
    model = build_model(config, LocalDispatcher())
    cost = model_cost(model, config)
    model.to_empty(device="cpu")
    initialise(model, whole_state(model), seed=0)
    counted = counted_flops(model, config)
    num_tokens = 2 * config.train.seq_len
    m, length = config.model, config.train.seq_len
    width = m.head_dim if name != "latent attention" else (6 + 2 + 4) // 2
    attention = 6 * m.num_layers * m.num_heads * width * length
    norms = sum(module.weight.numel() for module in model.modules() if isinstance(module, RMSNorm))
    # 6 N counts norms too, which multiply no matrix; attention is counted whole here, its causal half there.
    assert counted.pop("aten.bmm") == 2 * attention * num_tokens
    products = (cost.computed_flops_per_token - attention - 6 * norms) * num_tokens
    assert sum(counted.values()) == pytest.approx(products, rel=1e-12)
    assert cost.computed_flops_per_token >= cost.flops_per_token


def expert_width(layout: LayoutConfig) -> float:
    """Mean over the experts."""
    sizes = layout.expert_sizes
    return sum(s.num * s.ffn_dim for s in sizes) / layout.num_experts if sizes else layout.expert_ffn_dim


@pytest.mark.parametrize("name", LAYOUTS)
def test_active_parameters_are_those_of_the_chosen_experts(name: str) -> None:
    config = config_of(f"layout={name}")
    model = build_model(config, LocalDispatcher())
    layout, m = config.layout, config.model
    rest = sum(p.numel() for n, p in model.named_parameters() if ".experts." not in n)
    num_layers = sum(is_moe_layer(config, i) for i in range(m.num_layers))
    real = layout.num_experts / max(1, num_choosable(layout))
    passed = layout.top_k * real * 3 * m.dim * expert_width(layout) if num_layers else 0
    assert model_cost(model, config).num_active == pytest.approx(rest + num_layers * passed, abs=1)


def test_a_capacity_computes_empty_places_and_never_answers_more_than_it_has() -> None:
    wide, narrow = (config_of("layout=switch", f"layout.capacity_factor={c}") for c in (2.0, 0.5))
    costs = [model_cost(build_model(c, LocalDispatcher()), c) for c in (wide, narrow)]
    assert answered_share(wide.layout, 16) == 1 / 8 and answered_share(narrow.layout, 16) == 1 / 16
    expert = 2 * 3 * 16 * 32  # in two layers
    assert costs[0].computed_flops_per_token - costs[0].flops_per_token == 6 * expert
    assert costs[1].computed_flops_per_token == costs[1].flops_per_token
    assert costs[0].num_active - costs[1].num_active == expert // 2


def test_experts_of_each_width_are_dealt_to_all_ranks() -> None:
    layout = config_of("layout=ernie").layout
    ranks = rank_of_experts(layout, 4)
    assert ranks[:16] == [rank for rank in range(4) for _ in range(4)]
    assert ranks[16:] == [rank for rank in range(4) for _ in range(2)]


@pytest.mark.parametrize(
    ("overrides", "ep", "ranks_per_node", "expected"),
    [
        (["layout=switch"], 4, 1, 1),
        (["layout=mixtral"], 4, 1, 2),
        (["layout=expert_choice"], 4, 1, 4),
        (["layout=deepseek"], 4, 1, 4),
        (["layout=deepseek"], 8, 1, 6),
        (["layout=deepseek"], 8, 2, 4),
        (["layout=deepseek", "layout.num_groups=4", "layout.top_groups=2"], 8, 2, 2),  # a group is a node
        (["layout=deepseek", "layout.num_groups=4", "layout.top_groups=2"], 8, 4, 2),
        (["layout=deepseek", "layout.num_groups=4", "layout.top_groups=2"], 8, 1, 4),  # or two ranks
        (["layout=hierarchical"], 4, 1, 2),
        (["layout=hierarchical"], 8, 2, 2),
        (["layout=hierarchical", "layout.top_groups=1"], 8, 2, 1),
        (["layout=hierarchical", "layout.top_groups=1"], 8, 1, 2),
        (["layout=hierarchical", "layout.top_groups=1"], 2, 1, 1),  # two groups a rank
    ],
)
def test_groups_keep_a_token_on_few_places(
    overrides: list[str], ep: int, ranks_per_node: int, expected: int
) -> None:
    assert places_reached(config_of(*overrides).layout, ep, ranks_per_node) == expected


def test_bytes_between_ranks_by_hand() -> None:
    row = 4 * 16 * 4  # four trips of 16 numbers of four bytes
    extra = (2 * 4 + 2 * 4) + 2 * 4  # weights and experts of two choices, gradients of the weights
    ranks = 2 - 1 / 7  # of the seven other experts one is on the rank of the first choice
    assert all_to_all_bytes_per_token(config_of("layout=mixtral"), 4) == pytest.approx(
        2 * ranks * 3 / 4 * (row + extra)
    )
    assert all_to_all_bytes_per_token(config_of("layout=mixtral"), 1) == 0
    assert all_to_all_bytes_per_token(config_of("layout=dense"), 4) == 0
    half = config_of("layout=mixtral", "train.dtype=bf16")
    assert all_to_all_bytes_per_token(half, 4) == pytest.approx(2 * ranks * 3 / 4 * (row / 2 + extra))
    bounded = config_of("layout=mixtral", "parallel.max_tokens_in_flight=64")
    assert all_to_all_bytes_per_token(bounded, 4) == 2 * 2 * 3 / 4 * row  # a row a choice
    places = 8 * math.ceil(1.25 * 16 / 8)  # of a row of 16, in every layer
    assert all_to_all_bytes_per_token(config_of("layout=switch"), 2) == 2 * places / 16 / 2 * row


@pytest.mark.parametrize(
    ("overrides", "ep"),
    [
        (["layout=mixtral"], 4),
        (["layout=deepseek"], 4),
        (["layout=deepseek", "layout.num_groups=4", "layout.top_groups=2", "layout.top_k=4"], 8),
        (["layout=deepseek", "layout.num_groups=8", "layout.top_groups=2", "layout.top_k=3"], 4),
        (["layout=hierarchical"], 8),
        (["layout=ernie"], 4),
        (["layout=moe_plus_plus"], 2),
        (["layout=hash"], 4),
    ],
)
def test_ranks_visited_by_hand(overrides: list[str], ep: int) -> None:
    """Against all choices that the router can make, one by one."""
    layout = config_of(*overrides).layout
    ranks = [*rank_of_experts(layout, ep), *[None] * (num_choosable(layout) - layout.num_experts)]
    visited = [len({ranks[expert] for expert in choice} - {None}) for choice in possible_choices(layout)]
    assert ranks_visited(layout, ep) == pytest.approx(sum(visited) / len(visited))


def possible_choices(layout: LayoutConfig) -> list[tuple[int, ...]]:
    """Equally likely ones."""
    experts, k = range(num_choosable(layout)), layout.top_k
    if layout.router is RouterName.hash:
        part = len(experts) // k
        return list(product(*(experts[i * part : (i + 1) * part] for i in range(k))))
    size = len(experts) // layout.num_groups
    groups = [experts[first : first + size] for first in range(0, len(experts), size)]
    found: list[tuple[int, ...]] = []
    for some in combinations(groups, layout.top_groups):
        if layout.router is RouterName.hierarchical:
            inside = [combinations(group, k // layout.top_groups) for group in some]
            found += [tuple(chain.from_iterable(parts)) for parts in product(*inside)]
        else:
            found += combinations(list(chain.from_iterable(some)), k)
    return found
