"""The MoE layer. It is handed a dispatcher and never asks how it is parallelised."""

from __future__ import annotations

from torch import Tensor, nn

from parallel.dispatch.base import Dispatcher
from trainer.config import RunConfig
from trainer.models.layers import FeedForward
from trainer.moe.balance import MoeStats
from trainer.moe.experts import Experts
from trainer.moe.router import Router


class MoeLayer(nn.Module):
    """``y = Σ_k weight_k · expert_k(x) (+ shared(x))``.

    Shared experts (DeepSeekMoE, arXiv:2401.06066) are seen by every token; n of them are one feed-forward
    layer n times as wide, which is the same function.
    """

    def __init__(self, config: RunConfig, dispatcher: Dispatcher) -> None:
        super().__init__()
        model, layout = config.model, config.layout
        self.dispatcher = dispatcher
        self.router = Router(model.dim, layout)
        self.experts = Experts(layout.num_experts, model.dim, layout.expert_ffn_dim, model.activation)
        self.shared = None
        if layout.num_shared_experts:
            width = layout.num_shared_experts * layout.expert_ffn_dim
            self.shared = FeedForward(model.dim, width, model.activation)

    def forward(self, x_BSD: Tensor, targets_BS: Tensor) -> tuple[Tensor, MoeStats]:
        routing, stats = self.router(x_BSD, targets_BS)
        sent = self.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
        rows = self.experts(sent.rows_ND, sent.counts_E)
        y_BSD = self.dispatcher.combine(rows, routing, sent.metadata).view_as(x_BSD)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD)
        return y_BSD, stats._replace(sent=sent.num_sent)
