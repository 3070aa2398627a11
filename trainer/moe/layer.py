"""The MoE layer. It is handed a dispatcher and never asks how it is parallelised."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from parallel.dispatch.base import Dispatcher
from trainer.config import RunConfig
from trainer.models.layers import FeedForward, Linear
from trainer.moe.balance import MoeStats
from trainer.moe.experts import build_experts
from trainer.moe.positions import Positions
from trainer.moe.router import build_router


class MoeLayer(nn.Module):
    """``y = Σ_k weight_k · expert_k(x) (+ gate(x) · shared(x))``.

    Shared experts (DeepSeekMoE, arXiv:2401.06066) are seen by every token; n of them are one feed-forward
    layer n times as wide, which is the same function. Their gate is a sigmoid of one number a token
    (Qwen2-MoE, arXiv:2407.10671).

    Args:
        layer: index of the block, which keys its noise and its hash.
    """

    def __init__(self, config: RunConfig, dispatcher: Dispatcher, layer: int = 0) -> None:
        super().__init__()
        model, layout = config.model, config.layout
        self.dispatcher = dispatcher
        self.router = build_router(model.dim, layout, layer)
        self.experts = build_experts(config)
        self.shared = self.shared_gate = None
        if layout.num_shared_experts:
            width = layout.num_shared_experts * layout.expert_ffn_dim
            self.shared = FeedForward(model.dim, width, model.activation)
            self.shared_gate = Linear(model.dim, 1) if layout.shared_gate else None

    def forward(self, x_BSD: Tensor, positions: Positions) -> tuple[Tensor, MoeStats]:
        routing, stats, copy_BS = self.router(x_BSD, positions)
        y_TD, num_bytes = self.dispatcher.run(x_BSD.flatten(0, 1), routing, self.experts)
        y_BSD = y_TD.view_as(x_BSD)
        if copy_BS is not None:
            y_BSD = y_BSD + copy_BS[..., None].to(x_BSD.dtype) * x_BSD
        if self.shared is not None:
            shared_BSD = self.shared(x_BSD)
            if self.shared_gate is not None:
                shared_BSD = shared_BSD * F.sigmoid(self.shared_gate(x_BSD))
            y_BSD = y_BSD + shared_BSD
        return y_BSD, stats._replace(sent=num_bytes)
