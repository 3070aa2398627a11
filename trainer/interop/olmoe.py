"""OLMoE (arXiv:2409.02060): norms over whole queries and keys, scores not renormalised."""

from __future__ import annotations

from typing import Any

from parallel.errors import ConfigError
from trainer.config import QkNorm, RunConfig
from trainer.interop.family import (
    BLOCK,
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
)
from trainer.interop.hf_config import Fields, HfConfig


def read(hf: HfConfig) -> Fields:
    """Fields of an OLMoE."""
    hf.must_be("clip_qkv", None, None, "Muster does not clip queries, keys and values")
    return {
        **read_base(hf, eps=1e-5),
        **read_gqa(hf, with_head_dim=False),
        "model.ffn_dim": hf.size("intermediate_size"),
        "layout.expert_ffn_dim": hf.size("intermediate_size"),
        "layout.num_experts": hf.size("num_experts", "num_local_experts", default=64),
        "layout.top_k": hf.size("num_experts_per_tok", default=8),
        "layout.renormalize": hf.flag("norm_topk_prob", False),
    }


def write(config: RunConfig) -> dict[str, Any]:
    """An OLMoE's config.json."""
    model, layout = config.model, config.layout
    if model.head_dim * model.num_heads != model.dim:
        raise ConfigError(
            "model.head_dim",
            model.head_dim,
            f"an OLMoE's heads are model.dim / num_heads = {model.dim / model.num_heads:g} wide",
            "a run with heads of that width",
        )
    return {
        **write_base(OLMOE, config),
        "num_key_value_heads": model.num_kv_heads,
        "intermediate_size": layout.expert_ffn_dim,
        "num_experts": layout.num_experts,
        "num_experts_per_tok": layout.top_k,
        "norm_topk_prob": layout.renormalize,
        "clip_qkv": None,
        "router_aux_loss_coef": layout.balance.coefficient,
        "output_router_logits": False,
    }


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    layout="olmoe",
    names={**BLOCK, **GQA, **QK_NORM, **ROUTER, **EXPERTS},
    read=read,
    write=write,
    needs={"model.qk_norm": QkNorm.full},
    free=FREE_GQA | FREE_MOE | {"layout.renormalize"},
    ignored=IGNORED_MLA | {"model.ffn_dim"},
)
