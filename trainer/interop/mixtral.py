"""Mixtral (arXiv:2401.04088)."""

from __future__ import annotations

from typing import Any

from trainer.config import RunConfig
from trainer.interop.family import (
    BLOCK,
    FREE_GQA,
    FREE_MOE,
    GQA,
    IGNORED_MLA,
    Family,
    read_base,
    read_gqa,
    write_base,
    write_gqa,
)
from trainer.interop.hf_config import Fields, HfConfig


def read(hf: HfConfig) -> Fields:
    """Fields of a Mixtral."""
    hf.must_be("sliding_window", None, None, "Muster attends to all earlier positions")
    return {
        **read_base(hf, theta=1e6, eps=1e-5),
        **read_gqa(hf, kv_heads=8),
        "model.ffn_dim": hf.size("intermediate_size"),
        "layout.expert_ffn_dim": hf.size("intermediate_size"),
        "layout.num_experts": hf.size("num_local_experts", "num_experts", default=8),
        "layout.top_k": hf.size("num_experts_per_tok", default=2),
    }


def write(config: RunConfig) -> dict[str, Any]:
    """A Mixtral's config.json."""
    layout = config.layout
    own = {
        "intermediate_size": layout.expert_ffn_dim,
        "num_local_experts": layout.num_experts,
        "num_experts_per_tok": layout.top_k,
        "sliding_window": None,
        "router_aux_loss_coef": layout.balance.coefficient,
        "output_router_logits": False,
    }
    base = write_base(MIXTRAL, config)
    del base["attention_bias"]  # a Mixtral has no such key
    return {**base, **write_gqa(config), **own}


MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    layout="mixtral",
    names={
        **BLOCK,
        **GQA,
        "feed_forward.router.weight": "block_sparse_moe.gate.weight",
        "feed_forward.experts.w1": "block_sparse_moe.experts.{}.w1.weight",
        "feed_forward.experts.w2": "block_sparse_moe.experts.{}.w2.weight",
        "feed_forward.experts.w3": "block_sparse_moe.experts.{}.w3.weight",
    },
    read=read,
    write=write,
    free=FREE_GQA | FREE_MOE,
    ignored=IGNORED_MLA | {"model.ffn_dim"},
)
