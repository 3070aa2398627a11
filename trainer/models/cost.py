"""What a model costs, from its config: parameters, FLOPs, bytes between ranks.

Where the cost follows from what tokens choose, it is that of an even choice: every expert, zero and copy ones
counted, is chosen equally often. Then experts of several widths are met in proportion to their number, and a
zero or copy expert saves its share of a token's choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import torch
from torch import nn

from parallel.dispatch.base import TRIPS
from parallel.dispatch.visits import row_bytes
from parallel.placement import expert_modules
from trainer.config import AttentionKind, Dtype, RunConfig
from trainer.config_moe import LayoutConfig, RouterName
from trainer.models.transformer import is_moe_layer
from trainer.moe.capacity import row_capacity


@dataclass(frozen=True)
class Cost:
    """Attributes:
    num_parameters: all of them.
    num_active: those a token passes: everything but the experts that do not answer it.
    flops_per_token: forward and backward of one token (arXiv:2204.02311, appendix B): ``6 · N`` for the
        active parameters without the embedding table, and ``6 · layers · heads · head width · seq_len`` for
        causal attention. Gates of routers are among the parameters; a hash router has none. Recomputation
        does not count.
    computed_flops_per_token: the same with what experts compute on the empty places of a capacity.
    """

    num_parameters: int
    num_active: int
    flops_per_token: float
    computed_flops_per_token: float


def model_cost(model: nn.Module, config: RunConfig) -> Cost:
    """Cost of a whole model (on the meta device, before an engine cuts it)."""
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for _, module in expert_modules(model) for p in module.parameters())
    m, length = config.model, config.train.seq_len
    share = answered_share(config.layout, length) if experts else 0.0
    active = total - experts * (1 - share)
    embedding = 0 if m.tied_embeddings else m.vocab_size * m.dim
    head_dim = m.head_dim
    if m.attention is AttentionKind.mla:
        head_dim = (m.mla.qk_nope_head_dim + m.mla.qk_rope_head_dim + m.mla.v_head_dim) // 2
    attention = 6 * m.num_layers * m.num_heads * head_dim * length
    flops = 6.0 * (active - embedding) + attention
    padding = 0.0 if not experts else computed_share(config.layout, length) - share
    return Cost(total, round(active), flops, flops + 6.0 * experts * padding)


def num_choosable(layout: LayoutConfig) -> int:
    """Experts that a token may choose, those that compute nothing counted."""
    return layout.num_experts + layout.num_zero_experts + layout.num_copy_experts


def answered_share(layout: LayoutConfig, length: int) -> float:
    """Of the tokens of a row of ``length``, those that one expert answers.

    With ``sample_second`` this is the most that it can be: how many second choices are skipped depends on
    their weights.
    """
    capacity = row_capacity(layout, length)
    if layout.router is RouterName.expert_choice:
        assert capacity is not None, "the rules ask for it"
        return min(capacity, length) / length
    chosen = layout.top_k / num_choosable(layout)
    return chosen if capacity is None else min(chosen, capacity / length)


def computed_share(layout: LayoutConfig, length: int) -> float:
    """Rows that one expert computes / tokens of a row: with a capacity all its places, filled or not."""
    capacity = row_capacity(layout, length)
    return answered_share(layout, length) if capacity is None else capacity / length


def all_to_all_bytes_per_token(config: RunConfig, ep: int) -> float:
    """Bytes that leave a rank for one token of a step, forward and backward, all MoE layers.

    ``moe/a2a_bytes`` divided by the step's tokens. ``(ep - 1) / ep`` of what travels leaves its rank: with a
    capacity exactly, since every place travels; with ``parallel.max_tokens_in_flight`` on average, a row a choice,
    sent once (with several rounds backward sends it again); without either on average, a row for each rank with
    experts of the token's choice. Choices that favour some experts, or experts of one rank, make it less.
    """
    layout = config.layout
    num_layers = sum(is_moe_layer(config, i) for i in range(config.model.num_layers))
    if not num_layers:
        return 0.0
    dtype = torch.bfloat16 if config.train.dtype is Dtype.bf16 else torch.float32
    if layout.capacity_factor is None and config.parallel.max_tokens_in_flight is None:
        row = row_bytes(config.model.dim, dtype, layout.top_k, torch.float32)
        travels = ranks_visited(layout, ep) * row
    else:
        rows = layout.num_experts * computed_share(layout, config.train.seq_len)
        travels = rows * TRIPS * config.model.dim * dtype.itemsize
    return num_layers * travels * (ep - 1) / ep


def ranks_visited(layout: LayoutConfig, ep: int) -> float:
    """Ranks that hold an expert of a token's choice, on average over all choices that its router can make."""
    on_rank = rank_of_experts(layout, ep)
    return sum(1 - _misses(layout, [rank == here for rank in on_rank]) for here in range(ep))


def _misses(layout: LayoutConfig, held: list[bool]) -> float:
    """Share of a token's possible choices without any of the experts that are ``held``."""
    total, k = num_choosable(layout), layout.top_k
    held = held + [False] * (total - len(held))

    def without(experts: Sequence[bool], num: int) -> float:
        return math.comb(len(experts) - sum(experts), num) / math.comb(len(experts), num)

    if layout.router is RouterName.hash:  # a choice in each of K equal parts
        part = total // k
        return math.prod(without(held[i * part : (i + 1) * part], 1) for i in range(k))
    if layout.num_groups == 1:
        return without(held, k)
    size = total // layout.num_groups
    groups = [held[first : first + size] for first in range(0, total, size)]
    chosen = list(combinations(groups, layout.top_groups))
    if layout.router is RouterName.hierarchical:  # as many in each group
        shares = [math.prod(without(group, k // layout.top_groups) for group in some) for some in chosen]
    else:
        shares = [without(list(chain.from_iterable(some)), k) for some in chosen]
    return sum(shares) / len(shares)


def rank_of_experts(layout: LayoutConfig, ep: int) -> list[int]:
    """The ep rank of each expert by number: neighbours share one; of each width every rank has as many."""
    sizes = [size.num for size in layout.expert_sizes] or [layout.num_experts]
    return [index * ep // num for num in sizes for index in range(num)]


def places_reached(layout: LayoutConfig, ep: int, ranks_per_place: int = 1) -> int:
    """The most ranks that one token's choices are spread over, or with more ranks a place the most nodes.

    Without limits as many as it has choices; with groups no more than the chosen groups live on. That is
    what group-limited (arXiv:2412.19437, section 2.1.2) and hierarchical routing are for.

    Args:
        ranks_per_place: ep ranks of one node, where neighbouring ranks fill nodes in order.
    """
    place_of_expert = [rank // ranks_per_place for rank in rank_of_experts(layout, ep)]
    num_places = len(set(place_of_expert))
    if layout.router is RouterName.expert_choice:
        return num_places
    size = layout.num_experts // layout.num_groups
    groups = [place_of_expert[first : first + size] for first in range(0, layout.num_experts, size)]
    widest = sorted((len(set(group)) for group in groups), reverse=True)
    return min(num_places, layout.top_k, sum(widest[: layout.top_groups]))
