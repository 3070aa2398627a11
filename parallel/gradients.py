"""Global norm and clipping over both mesh views.

Gradients reach this file as sums over tokens. Within one replica every rank's slices are disjoint and cover
the model, dense and expert parameters alike, so the squared norm is one sum of local squares over the replica.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def global_norm(local_gradients: Sequence[Tensor], replica: dist.ProcessGroup) -> Tensor:
    """L2 norm over every parameter of the model, fp32, 0-dim, no host sync.

    Args:
        local_gradients: this rank's slices; empty ones are fine.
        replica: ranks that hold one full copy between them.
    """
    assert local_gradients, "a model without gradients has no norm"
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in local_gradients])
    square = norms.double().square().sum()
    dist.all_reduce(square, group=replica)
    return square.sqrt().float()


@torch.no_grad()
def clip_(local_gradients: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale in place by ``min(1, max_norm / norm)``, by 1 where the norm is not finite.

    The formula is that of ``torch.nn.utils.clip_grads_with_norm_`` (1e-6 in the denominator). There a norm of NaN
    would spread to every gradient; here they still show where it comes from.
    """
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    scale = torch.where(torch.isfinite(norm), scale, 1.0)
    torch._foreach_mul_(list(local_gradients), scale)
