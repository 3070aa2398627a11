"""The decoder-only transformer: embedding, blocks of attention and feed-forward (dense or MoE), head."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.dispatch.base import Dispatcher
from parallel.recompute import recomputed
from trainer.config import Dtype, ModelConfig, RunConfig
from trainer.data.batch import IGNORED
from trainer.models.attention import RotaryTable, build_attention, document_mask, kept_shape, rotary_dim
from trainer.models.cache import KvCache, Remember
from trainer.models.cross_entropy import linear_cross_entropy
from trainer.models.layers import FeedForward, Linear, RMSNorm, rotary_table
from trainer.moe.balance import MoeStats
from trainer.moe.layer import MoeLayer
from trainer.moe.noise import sample_keys
from trainer.moe.positions import Positions
from trainer.moe.router import Router


class Losses(NamedTuple):
    """Sums of one micro-batch; the trainer divides by the step's global number of target tokens.

    Attributes:
        cross_entropy: Σ −log p(target), nats, fp32, with gradient.
        moe: one entry a MoE layer, in order.
    """

    cross_entropy: Tensor
    moe: tuple[MoeStats, ...]


class Block(nn.Module):
    """Pre-norm residual block: attention, then a dense or MoE feed-forward layer.

    With ``recompute`` only the block's input is kept and the rest computed again in backward, except the
    router's choice and what the all-to-all brought: those are recorded, so a token is never routed anew.
    With ``compiled`` all before the feed-forward layer is compiled in training, once for all blocks.

    Args:
        feed_forward: ``forward(x)``, or ``forward(x, positions)`` for one that must know more of them
            (:class:`trainer.moe.positions.Positions`). Returns ``y``, or ``(y, MoeStats)``.
    """

    def __init__(
        self, model: ModelConfig, feed_forward: nn.Module, recompute: bool, compiled: bool = False
    ) -> None:
        super().__init__()
        self.recompute, self.compiled = recompute, compiled
        self.attention_norm = RMSNorm(model.dim, model.norm_eps)
        self.attention = build_attention(model)
        self.ffn_norm = RMSNorm(model.dim, model.norm_eps)
        self.feed_forward = feed_forward
        self.takes_positions = not takes(feed_forward, 1)

    def forward(
        self,
        x: Tensor,
        table: RotaryTable,
        mask: Tensor | None,
        positions: Positions,
        remember: Remember | None = None,
    ) -> tuple[Tensor, MoeStats | None]:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(self._forward, x, table, mask, positions)
        return self._forward(x, table, mask, positions, remember)

    def _forward(
        self,
        x: Tensor,
        table: RotaryTable,
        mask: Tensor | None,
        positions: Positions,
        remember: Remember | None = None,
    ) -> tuple[Tensor, MoeStats | None]:
        attend = _compiled_attend() if self.compiled and self.training else Block._attend
        x, normed = attend(self, x, table, mask, remember)
        y = self.feed_forward(normed, positions) if self.takes_positions else self.feed_forward(normed)
        y, stats = y if isinstance(y, tuple) else (y, None)
        return x + y, stats

    def _attend(
        self, x: Tensor, table: RotaryTable, mask: Tensor | None, remember: Remember | None
    ) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x), table, mask, remember)
        return x, self.ffn_norm(x)


@cache
def _compiled_attend() -> Callable[..., tuple[Tensor, Tensor]]:
    settings: Any = importlib.import_module("torch._inductor.config")
    settings.compile_threads = 1  # in this process: workers that are killed leave no compiler behind
    return torch.compile(Block._attend, dynamic=False)


def takes(module: nn.Module, num_tensors: int) -> bool:
    """Whether a module's forward can be called with this many positional arguments."""
    try:
        inspect.signature(module.forward).bind(*[None] * num_tensors)
    except TypeError:
        return False
    return True


class Transformer(nn.Module):
    """A language model; build it under ``torch.device("meta")`` and let an engine give it storage.

    Args:
        config: a resolved run config (``model``, ``layout``, ``train.dtype``).
        dispatcher: takes tokens to experts; ``LocalDispatcher`` for one process.
        make_feed_forward: ``(config, layer index, dispatcher) -> module`` for a layout of your own.
    """

    def __init__(
        self,
        config: RunConfig,
        dispatcher: Dispatcher,
        make_feed_forward: Callable[[RunConfig, int, Dispatcher], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        model, train = config.model, config.train
        self.config = model
        self.seed = config.train.seed
        self.dtype = torch.bfloat16 if config.train.dtype is Dtype.bf16 else torch.float32
        make = make_feed_forward or default_feed_forward
        self.embedding = nn.Embedding(model.vocab_size, model.dim)
        self.layers = nn.ModuleList(
            Block(model, make(config, i, dispatcher), train.activation_checkpointing, train.compile)
            for i in range(model.num_layers)
        )
        self.norm = RMSNorm(model.dim, model.norm_eps)
        self.head = None if model.tied_embeddings else Linear(model.dim, model.vocab_size)

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        document_ids_BS: Tensor | None = None,
        sample_ids_B: Tensor | None = None,
        cache: KvCache | None = None,
    ) -> Losses | Tensor:
        """Losses against targets, or without targets the logits.

        Args:
            tokens_BS: int64.
            targets_BS: int64, ``IGNORED`` where nothing is predicted.
            document_ids_BS: if given, no position attends beyond its own document.
            sample_ids_B: each row's place in the order of training, int64, from which the noise of a layout
                that has some is drawn; None: no noise.
            cache: from :meth:`make_cache`, after ``next``: the tokens go on where each row of it ends.

        Returns:
            ``Losses``, or logits ``[B, S, vocab_size]`` in fp32; with a cache those after the last real token
            of each row, ``[B, vocab_size]``.
        """
        x = F.embedding(tokens_BS, self.embedding.weight).to(self.dtype)
        if cache is not None:
            return self._next_logits(x, tokens_BS, cache)
        mask = None if document_ids_BS is None else document_mask(document_ids_BS)
        table = self._rotary_table(tokens_BS.shape[1], x.device)
        counted = torch.ones_like(tokens_BS) if targets_BS is None else targets_BS != IGNORED
        keys = None if sample_ids_B is None else sample_keys(sample_ids_B, self.seed)
        positions = Positions(counted.float(), tokens_BS, keys)
        moe = []
        for block in self.layers:
            x, stats = block(x, table, mask, positions)
            if stats is not None:
                moe.append(stats)
        if targets_BS is None:
            return self._logits(x)
        rows, targets = self.norm(x).flatten(0, 1), targets_BS.flatten()
        return Losses(linear_cross_entropy(rows, self._head_weight(), targets), tuple(moe))

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self._head_weight()).float()

    def _head_weight(self) -> Tensor:
        weight = self.embedding.weight if self.head is None else self.head.weight
        return weight.to(self.dtype)

    def _rotary_table(self, length: int, device: torch.device) -> RotaryTable:
        c = self.config
        return rotary_table(length, rotary_dim(c), c.rope_theta, device, c.rope_scaling)

    def make_cache(self, num_rows: int, size: int, device: torch.device) -> KvCache:
        """An empty cache for rows of at most ``size`` tokens."""
        num_heads, widths = kept_shape(self.config)
        table = self._rotary_table(size, device)
        return KvCache(len(self.layers), num_rows, size, num_heads, widths, table, self.dtype)

    def _next_logits(self, x: Tensor, tokens_BS: Tensor, cache: KvCache) -> Tensor:
        positions = Positions(torch.ones(x.shape[:2], device=x.device), tokens_BS, None)
        for index, block in enumerate(self.layers):
            x, _ = block(x, cache.table, cache.mask, positions, cache.layer(index))
        rows = torch.arange(len(x), device=x.device)
        return self._logits(x[rows, cache.last_B])

    def shard_units(self) -> list[nn.Module]:
        """Modules an engine gathers and frees as a whole."""
        return list(self.layers)

    @torch.no_grad()
    def after_step(self, counts_LE: Tensor) -> None:
        """Let every router take in the step's loads (its bias, the load that its balance loss knows).

        Args:
            counts_LE: routed pairs of each expert of each MoE layer over all ranks, int64.
        """
        routers = [module for module in self.modules() if isinstance(module, Router)]
        if any(router.learns_from_loads for router in routers):
            for router, counts_E in zip(routers, counts_LE, strict=True):
                router.after_step(counts_E)

    def init_std(self, name: str) -> float:
        """Standard deviation of a parameter's initial normal distribution (norms start as ones anyway).

        Layers that write into the residual stream start smaller by ``1 / sqrt(2 · num_layers)`` (GPT-2).
        """
        if name.endswith(".bias"):  # of a feed-forward layer that is not ours
            return 0.0
        residual = name.endswith(("wo.weight", "w2.weight", ".w2"))
        return self.config.init_std * ((2 * self.config.num_layers) ** -0.5 if residual else 1.0)


def is_moe_layer(config: RunConfig, index: int) -> bool:
    """Whether layer ``index`` has experts: after the first dense ones, the last of every ``moe_every``."""
    layout = config.layout
    after = index - layout.first_dense_layers
    return layout.num_experts > 0 and after >= 0 and after % layout.moe_every == layout.moe_every - 1


def moe_layers(config: RunConfig) -> list[int]:
    """Indices of the layers that have experts."""
    return [index for index in range(config.model.num_layers) if is_moe_layer(config, index)]


def default_feed_forward(config: RunConfig, index: int, dispatcher: Dispatcher) -> nn.Module:
    """Dense or MoE, as the layout says."""
    if is_moe_layer(config, index):
        return MoeLayer(config, dispatcher, index)
    return FeedForward(config.model.dim, config.model.ffn_dim, config.model.activation)
