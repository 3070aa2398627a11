"""RMSNorm and rotary embedding with a backward of their own: half and a third of autograd's passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dim (arXiv:1910.07467), in the dtype of ``x``."""
    found: Tensor = _RmsNorm.apply(x, weight, eps)
    return found


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + C/2) of the last dim, turned: ``x · cos + (-second, first) · sin`` (arXiv:2104.09864).

    Args:
        x: ``[…, S, C]``.
        cos, sin: broadcast to it; no gradient.
    """
    found: Tensor = _Rotated.apply(x, cos, sin)
    return found


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        dy_x = (dy * x).reshape(-1, x.shape[-1])
        dweight = torch.mv(dy_x.t(), scale.flatten())
        inner = torch.mv(dy_x, weight).view_as(scale)  # Σ dy · weight · x of each row
        dx = (dy * weight).mul_(scale).addcmul_(x, inner * scale.pow(3) / -x.shape[-1])
        return dx, dweight, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(dy, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y
