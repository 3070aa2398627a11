"""Qwen3-MoE (arXiv:2505.09388): norms by head, dense layers where ``config.json`` says so."""

from __future__ import annotations

from typing import Any

from trainer.config import QkNorm, RunConfig
from trainer.interop.family import (
    BLOCK,
    DENSE,
    EXPERTS,
    FREE_GQA,
    FREE_MOE,
    GQA,
    IGNORED_MLA,
    QK_NORM,
    ROUTER,
    Family,
    read_base,
    read_gqa,
    write_base,
    write_gqa,
)
from trainer.interop.hf_config import Fields, HfConfig
from trainer.models.transformer import is_moe_layer


def read(hf: HfConfig) -> Fields:
    """Fields of a Qwen3-MoE."""
    hf.must_be("use_sliding_window", False, False, "Muster attends to all earlier positions")
    num_layers = hf.size("num_hidden_layers")
    dense = hf.take("mlp_only_layers", default=[])
    step = hf.size("decoder_sparse_step", default=1)
    moe = [i for i in range(num_layers) if i not in dense and (i + 1) % step == 0]
    first, every = _placement(hf, moe, num_layers)
    return {
        **read_base(hf),
        **read_gqa(hf, kv_heads=4),
        "model.ffn_dim": hf.size("intermediate_size"),
        "layout.expert_ffn_dim": hf.size("moe_intermediate_size"),
        "layout.num_experts": hf.size("num_experts", "num_local_experts", default=128),
        "layout.top_k": hf.size("num_experts_per_tok", default=8),
        "layout.renormalize": hf.flag("norm_topk_prob", False),
        "layout.first_dense_layers": first,
        "layout.moe_every": every,
    }


def _placement(hf: HfConfig, moe: list[int], num_layers: int) -> tuple[int, int]:
    """``first_dense_layers`` and ``moe_every`` that put experts into just these layers."""
    for every in range(1, num_layers + 1):
        for first in range(num_layers):
            if moe and moe == list(range(first + every - 1, num_layers, every)):
                return first, every
    raise hf.wrong(
        "mlp_only_layers",
        hf.values.get("mlp_only_layers"),
        f"puts experts into the layers {moe}; Muster has dense layers first, then experts in each n-th",
        "a model with such a pattern",
    )


def write(config: RunConfig) -> dict[str, Any]:
    """A Qwen3-MoE's config.json."""
    model, layout = config.model, config.layout
    own = {
        "intermediate_size": model.ffn_dim,
        "moe_intermediate_size": layout.expert_ffn_dim,
        "num_experts": layout.num_experts,
        "num_experts_per_tok": layout.top_k,
        "norm_topk_prob": layout.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(model.num_layers) if not is_moe_layer(config, i)],
        "use_sliding_window": False,
        "sliding_window": None,
        "router_aux_loss_coef": layout.balance.coefficient,
        "output_router_logits": False,
    }
    return {**write_base(QWEN3_MOE, config), **write_gqa(config), **own}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    layout="qwen3_moe",
    names={**BLOCK, **GQA, **QK_NORM, **DENSE, **ROUTER, **EXPERTS},
    read=read,
    write=write,
    needs={"model.qk_norm": QkNorm.head},
    free=FREE_GQA
    | FREE_MOE
    | {"model.ffn_dim", "layout.renormalize", "layout.first_dense_layers", "layout.moe_every"},
    ignored=IGNORED_MLA,
    harmless=frozenset({"sliding_window", "max_window_layers"}),  # read where use_sliding_window is true
)
