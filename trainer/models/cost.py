"""What a model costs, from its config: parameters and FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from parallel.placement import expert_modules
from trainer.config import AttentionKind, RunConfig


@dataclass(frozen=True)
class Cost:
    """Attributes:
    num_parameters: all of them.
    num_active: those a token passes: everything but the experts it is not routed to.
    flops_per_token: forward and backward of one token (arXiv:2204.02311, appendix B): ``6 · N`` for the
        active parameters without the embedding table, and ``6 · layers · heads · head width · seq_len`` for
        causal attention. Recomputation does not count.
    """

    num_parameters: int
    num_active: int
    flops_per_token: float


def model_cost(model: nn.Module, config: RunConfig) -> Cost:
    """Cost of a whole model (on the meta device, before an engine cuts it)."""
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for _, module in expert_modules(model) for p in module.parameters())
    layout, m = config.layout, config.model
    # Where experts differ, or some compute nothing, this is what an even choice among them passes.
    choosable = layout.num_experts + layout.num_zero_experts + layout.num_copy_experts
    share = layout.top_k / choosable if choosable else 0.0
    active = total - round(experts * (1 - share))
    embedding = 0 if m.tied_embeddings else m.vocab_size * m.dim
    head_dim = m.head_dim
    if m.attention is AttentionKind.mla:
        head_dim = (m.mla.qk_nope_head_dim + m.mla.qk_rope_head_dim + m.mla.v_head_dim) // 2
    attention = 6 * m.num_layers * m.num_heads * head_dim * config.train.seq_len
    return Cost(total, active, 6.0 * (active - embedding) + attention)
