"""Causal self-attention: grouped-query (GQA) and multi-head latent (MLA), both through PyTorch's SDPA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import AttentionKind, ModelConfig, QkNorm
from trainer.models.cache import Remember
from trainer.models.layers import Linear, RMSNorm, rotate
from trainer.models.rope import softmax_gain

RotaryTable = tuple[Tensor, Tensor]


def document_mask(document_ids_BS: Tensor) -> Tensor:
    """``[B, 1, S, S]``, True where a query may look: at itself and earlier in its own document."""
    same = document_ids_BS[:, :, None] == document_ids_BS[:, None, :]
    return same.tril()[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """SDPA over ``[B, H, S, C]`` (fewer key heads than query heads are shared); plain causal without a mask.

    Args:
        scale: of the logits; None: ``C ** -0.5``.
    """
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, scale=scale, enable_gqa=shared
    )


class GroupedQueryAttention(nn.Module):
    """arXiv:2305.13245; with ``qk_norm``, queries and keys are normed by head (Qwen3) or whole (OLMoE)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.wq = Linear(config.dim, q_dim)
        self.wk = Linear(config.dim, kv_dim)
        self.wv = Linear(config.dim, kv_dim)
        self.wo = Linear(q_dim, config.dim)
        self.qk_norm = config.qk_norm
        if self.qk_norm is not QkNorm.none:
            whole = self.qk_norm is QkNorm.full
            self.q_norm = RMSNorm(q_dim if whole else self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(kv_dim if whole else self.head_dim, config.norm_eps)

    def forward(
        self, x_BSD: Tensor, table: RotaryTable, mask: Tensor | None, remember: Remember | None = None
    ) -> Tensor:
        batch, length, _ = x_BSD.shape
        q, k, v = self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD)
        if self.qk_norm is QkNorm.full:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(batch, length, self.num_heads, self.head_dim)
        k = k.view(batch, length, self.num_kv_heads, self.head_dim)
        v = v.view(batch, length, self.num_kv_heads, self.head_dim)
        if self.qk_norm is QkNorm.head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q.transpose(1, 2), table), rotate(k.transpose(1, 2), table), v.transpose(1, 2)
        if remember is not None:
            k, v = remember(k, v)
        y = attend(q, k, v, mask)
        return self.wo(y.transpose(1, 2).reshape(batch, length, -1))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Queries and keys/values pass through low-rank latents; the rotary part of the key is one head shared by
    all. With a cache only the latent and that part are kept of a token.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        m = config.mla
        self.num_heads = config.num_heads
        self.nope, self.rope, self.v_dim = m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim
        self.q_lora_rank, self.kv_rank = m.q_lora_rank, m.kv_lora_rank
        self.scale = (self.nope + self.rope) ** -0.5 * softmax_gain(config.rope_scaling)
        eps = config.norm_eps if m.norm_eps is None else m.norm_eps
        q_dim = self.num_heads * (self.nope + self.rope)
        if m.q_lora_rank:
            self.wq_a = Linear(config.dim, m.q_lora_rank)
            self.q_norm = RMSNorm(m.q_lora_rank, eps)
            self.wq_b = Linear(m.q_lora_rank, q_dim)
        else:
            self.wq = Linear(config.dim, q_dim)
        self.wkv_a = Linear(config.dim, m.kv_lora_rank + self.rope)
        self.kv_norm = RMSNorm(m.kv_lora_rank, eps)
        self.wkv_b = Linear(m.kv_lora_rank, self.num_heads * (self.nope + self.v_dim))
        self.wo = Linear(self.num_heads * self.v_dim, config.dim)

    def forward(
        self, x_BSD: Tensor, table: RotaryTable, mask: Tensor | None, remember: Remember | None = None
    ) -> Tensor:
        batch, length, _ = x_BSD.shape
        q = self._queries(x_BSD)
        q = q.view(batch, length, self.num_heads, self.nope + self.rope).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.wkv_a(x_BSD).split([self.kv_rank, self.rope], dim=-1)
        latent, k_rope, q_rope = self.kv_norm(latent), rotate(k_rope[:, None], table), rotate(q_rope, table)
        if remember is not None:
            assert mask is not None
            y = self._attend_latents(q_nope, q_rope, *remember(latent[:, None], k_rope), mask)
            return self.wo(y.transpose(1, 2).reshape(batch, length, -1))
        kv = self.wkv_b(latent)
        kv = kv.view(batch, length, self.num_heads, self.nope + self.v_dim).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.v_dim], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        y = attend(
            q, torch.cat([k_nope, k_rope.expand(-1, self.num_heads, -1, -1)], dim=-1), v, mask, self.scale
        )
        return self.wo(y.transpose(1, 2).reshape(batch, length, -1))

    def _queries(self, x_BSD: Tensor) -> Tensor:
        if self.q_lora_rank:
            return self.wq_b(self.q_norm(self.wq_a(x_BSD)))
        return self.wq(x_BSD)

    def _attend_latents(
        self, q_nope: Tensor, q_rope: Tensor, latent_B1LR: Tensor, k_rope: Tensor, mask: Tensor
    ) -> Tensor:
        """Attention over latents, ``[B, H, S, v_dim]``: the same sums without a key or value of any head.

        ``q · (W_k c) = (W_kᵀ q) · c`` and ``Σ p W_v c = W_v Σ p c`` (the paper's section 2.1.2): the heads
        become queries of one head whose keys and values are the latents, so that a token costs what is kept
        of it and not ``num_heads`` times as much.
        """
        batch, heads, length, _ = q_nope.shape
        up = self.wkv_b.weight.to(q_nope.dtype).view(heads, self.nope + self.v_dim, self.kv_rank)
        up_k, up_v = up.split([self.nope, self.v_dim], dim=1)
        q = torch.cat([torch.einsum("bhsn,hnr->bhsr", q_nope, up_k), q_rope], dim=-1)
        y = F.scaled_dot_product_attention(
            q.flatten(1, 2)[:, None],
            torch.cat([latent_B1LR, k_rope], dim=-1),
            latent_B1LR,
            attn_mask=mask.expand(-1, heads, -1, -1).flatten(1, 2)[:, None],
            scale=self.scale,
        )
        return torch.einsum("bhsr,hvr->bhsv", y.view(batch, heads, length, -1), up_v)


def build_attention(config: ModelConfig) -> nn.Module:
    """The attention the config names."""
    if config.attention is AttentionKind.mla:
        return LatentAttention(config)
    return GroupedQueryAttention(config)


def kept_shape(config: ModelConfig) -> tuple[int, tuple[int, int]]:
    """What attention keeps of a token in a layer: heads, and the widths of the two tensors."""
    if config.attention is AttentionKind.mla:
        return 1, (config.mla.kv_lora_rank, config.mla.qk_rope_head_dim)
    return config.num_kv_heads, (config.head_dim, config.head_dim)


def rotary_dim(config: ModelConfig) -> int:
    """Width of the rotated part of a head."""
    return config.mla.qk_rope_head_dim if config.attention is AttentionKind.mla else config.head_dim
