"""Making a config small enough to prove in seconds without losing what can go wrong in it.

Kept as asked: router, top-k, scores, shared experts, groups, capacity factor, tied weights, norms, attention kind,
engine and its settings, whether gradients are accumulated, whether blocks are recomputed, targets of the
user's own. Every parallel degree above 1 stays at least 2. What is changed is listed in the certificate.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

from trainer.config import (
    CallbackConfig,
    Device,
    Dtype,
    RunConfig,
    Schedule,
    Source,
    Terminal,
    WandbMode,
    parallel_dims,
)
from trainer.config_moe import CureConfig, RouterName
from trainer.config_survival import GuardConfig

STEPS = 3
"""Optimizer steps of a proof; the run is stopped and resumed before the last one."""
_KEPT_WORLD = 4


@dataclass(frozen=True)
class Change:
    """A field that is run with another value than asked."""

    field: str
    asked: Any
    run: Any


def shrink(asked: RunConfig, device: Device, recorder: CallbackConfig) -> tuple[RunConfig, list[Change]]:
    """The config that is run instead of a resolved one, and where the two differ.

    Args:
        asked: resolved and validated.
        device: where the layout's ranks compute; fp32 either way.
        recorder: the callback that writes down what they compute.
    """
    c = copy.deepcopy(asked)
    accumulation = asked.train.global_batch // (asked.train.micro_batch * parallel_dims(asked).dp)
    _shrink_world(c)
    _shrink_model(c)
    _shrink_experts(c)
    dims = parallel_dims(c)
    train = c.train
    train.micro_batch, train.pad_batch = min(2, train.micro_batch), False
    train.global_batch = train.micro_batch * dims.dp * (3 if accumulation > 1 else 1)  # 3: no degree's factor
    train.seq_len, train.steps = 24, STEPS
    _shrink_budget(c)
    train.dtype, train.num_threads, c.device = Dtype.fp32, 1, device
    c.optim.schedule, c.optim.warmup_steps, c.optim.lr = Schedule.constant, 0, 1e-3
    c.optim.max_grad_norm = min(0.1, c.optim.max_grad_norm)  # so that it clips, if it ever does
    c.data.source, c.data.path, c.data.name = Source.stdlib, None, None
    c.data.target, c.data.kwargs = "trainer.proof.corpus:documents", {}
    c.data.valid_fraction, c.data.virtual_shards = 0.2, train.global_batch
    c.data.tokenizer.path, c.data.tokenizer.vocab_size = None, 264
    c.train.verify_first, c.train.profile = False, None
    c.eval.every = c.eval.sample_tokens = 0
    c.checkpoint.every, c.checkpoint.keep_last, c.checkpoint.load_from = 1, 4, None
    c.checkpoint.memory_every = 0
    c.logger.every, c.logger.terminal, c.logger.wandb.mode = 1, Terminal.off, WandbMode.disabled
    c.health.trace_every, c.health.replay = 0, None
    c.resilience.collective_timeout_seconds = 60.0
    c.resilience.max_restarts = 0
    c.resilience.check_exchanges = True
    c.guard = GuardConfig()  # a step that is not finite must show
    c.cure = CureConfig()  # what is proven is the layout; a cure would change the model midway
    c.callbacks = [recorder]
    return c, changes(asked, c)


def _shrink_world(c: RunConfig) -> None:
    dims = parallel_dims(c)
    if dims.world_size > _KEPT_WORLD:
        above = [degree for degree in (dims.dp_replicate, dims.expert_shard, dims.ep) if degree > 1]
        # Two degrees can be told apart by a wrong factor of 2 or of 3; three would take 30 processes.
        ep = 1 if dims.ep == 1 else (3 if len(above) == 2 and dims.ep % 2 else 2)
        replicas = min(2, dims.dp_replicate)
        sets = 1 if dims.expert_shard == 1 else (3 if len(above) == 2 and ep == 2 and replicas == 1 else 2)
        c.parallel.dp_replicate, c.parallel.ep = replicas, ep
        c.parallel.dp_shard = sets * ep
        c.launcher.nproc_per_node = replicas * sets * ep
    c.launcher.nnodes, c.launcher.num_nodes = 1, -1
    if dims.world_size <= _KEPT_WORLD:
        c.launcher.nproc_per_node = dims.world_size


def _shrink_model(c: RunConfig) -> None:
    m, layout = c.model, c.layout
    grouped = m.num_heads // max(1, m.num_kv_heads)
    m.num_kv_heads = min(2, m.num_kv_heads)
    m.num_heads = m.num_kv_heads * min(2, grouped)
    m.dim, m.head_dim, m.ffn_dim, m.vocab_size = 48, 8, 48, 264
    m.mla.q_lora_rank, m.mla.kv_lora_rank = (
        min(size, 24) for size in (m.mla.q_lora_rank, m.mla.kv_lora_rank)
    )
    m.mla.qk_nope_head_dim, m.mla.v_head_dim = min(8, m.mla.qk_nope_head_dim), min(8, m.mla.v_head_dim)
    m.mla.qk_rope_head_dim = min(4, m.mla.qk_rope_head_dim)
    m.init_std = 0.2  # scores far enough apart that rounding does not decide between experts
    layout.first_dense_layers = min(1, layout.first_dense_layers)
    layout.moe_every = min(2, layout.moe_every)
    m.num_layers = min(m.num_layers, layout.first_dense_layers + 2)


def _shrink_experts(c: RunConfig) -> None:
    layout = c.layout
    if not layout.num_experts:
        return
    groups = layout.num_groups if layout.num_groups <= 4 else 4
    top_groups = max(1, layout.top_groups * groups // layout.num_groups)
    if layout.router is RouterName.hierarchical:
        layout.top_k = top_groups * max(1, layout.top_k // layout.top_groups)
    layout.num_groups, layout.top_groups = groups, top_groups
    unit = math.lcm(c.parallel.ep, groups, layout.top_k if layout.router is RouterName.hash else 1)
    wanted = max(4, layout.top_k + 2, math.ceil(layout.top_k * groups / layout.top_groups))
    layout.num_experts = unit * math.ceil(wanted / unit)
    layout.expert_ffn_dim = 24
    for index, size in enumerate(layout.expert_sizes):
        size.num, size.ffn_dim = unit * math.ceil(3 / unit), 24 * (index + 1)
    if layout.expert_sizes:
        layout.num_experts = sum(size.num for size in layout.expert_sizes)
    layout.num_zero_experts, layout.num_copy_experts = (
        min(2, num) for num in (layout.num_zero_experts, layout.num_copy_experts)
    )
    balance = layout.balance
    if layout.router not in (RouterName.hash, RouterName.expert_choice):
        balance.coefficient = balance.coefficient or 0.01
    if layout.router is not RouterName.hash:
        balance.router_z = balance.router_z or 0.001


def _shrink_budget(c: RunConfig) -> None:
    """Few enough rows at a time that some rank of each exchange gets its rows in two rounds or more.

    A rank sends as many as it is sent on average: the most anyone gets is no less. A share of the choices may be
    experts that compute nothing.
    """
    if c.parallel.max_tokens_in_flight is None:
        return
    layout = c.layout
    num_rows = c.train.micro_batch * c.train.seq_len * layout.top_k
    if layout.capacity_factor is not None:
        num_rows = math.ceil(num_rows * min(1.0, layout.capacity_factor))
    computing = layout.num_experts / (layout.num_experts + layout.num_zero_experts + layout.num_copy_experts)
    budget = max(1, int(num_rows * computing * 0.3))
    c.parallel.max_tokens_in_flight = min(budget, c.parallel.max_tokens_in_flight)


def changes(asked: Any, run: Any, prefix: str = "") -> list[Change]:
    """Fields in which two configs differ, in schema order."""
    found = []
    for name, value in vars(asked).items():
        other, path = getattr(run, name), f"{prefix}{name}"
        if hasattr(value, "__dataclass_fields__"):
            found += changes(value, other, f"{path}.")
        elif value != other:
            found.append(Change(path, _shown(value), _shown(other)))
    return found


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return [getattr(item, "target", item) for item in value]
    return getattr(value, "value", value)
