"""Linear, RMSNorm, rotary embedding and the dense feed-forward layer.

Weights are fp32 masters; each module casts to the dtype of the activations that reach it, so that the model
computes the same with and without a sharding engine that gathers in bf16.

Shape suffixes: B rows, S positions, D model width, F feed-forward width, H heads, C head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import Activation, RopeScalingConfig
from trainer.models.pointwise import rms_norm, rotated
from trainer.models.rope import rotary_frequencies, rotary_gain


class Linear(nn.Module):
    """``y = x Wᵀ`` without bias; weight ``[out, in]``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dim (arXiv:1910.07467), computed in fp32."""

    keep_fp32 = True

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide, weight = x.float(), self.weight.float()
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return rms_norm(wide, weight, self.eps).to(x.dtype)
        return F.rms_norm(wide, weight.shape, weight, self.eps).to(x.dtype)


def rotary_table(
    length: int, dim: int, theta: float, device: torch.device, scaling: RopeScalingConfig
) -> tuple[Tensor, Tensor]:
    """cos and sin ``[S, dim]``, fp32, of rotary embeddings (arXiv:2104.09864), halves not interleaved."""
    frequencies = rotary_frequencies(dim, theta, scaling, device)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    gain = rotary_gain(scaling)
    return angles.cos() * gain, angles.sin() * gain


def rotate(x_BHSC: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the rotary embedding to ``[B, H, S, C]``."""
    cos, sin = (t.to(x_BHSC.dtype) for t in table)
    if torch.compiler.is_compiling():  # which fuses what is written out, forward and backward
        first, second = x_BHSC.chunk(2, dim=-1)
        return x_BHSC * cos + torch.cat([-second, first], dim=-1) * sin
    return rotated(x_BHSC, cos, sin)


def activate(gate: Tensor, up: Tensor | None, activation: Activation) -> Tensor:
    """SwiGLU ``silu(gate) · up`` (arXiv:2002.05202), or gelu / relu of ``gate`` alone."""
    if activation is Activation.swiglu:
        assert up is not None
        return F.silu(gate) * up
    return F.gelu(gate) if activation is Activation.gelu else F.relu(gate)


class FeedForward(nn.Module):
    """Dense feed-forward: ``w2(silu(w1 x) · w3 x)``, or ``w2(act(w1 x))`` without a gate."""

    def __init__(self, dim: int, ffn_dim: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.w1 = Linear(dim, ffn_dim)
        self.w2 = Linear(ffn_dim, dim)
        self.w3 = Linear(dim, ffn_dim) if activation is Activation.swiglu else None

    def forward(self, x: Tensor) -> Tensor:
        up = self.w3(x) if self.w3 is not None else None
        return self.w2(activate(self.w1(x), up, self.activation))
