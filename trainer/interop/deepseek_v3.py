"""DeepSeek-V3 and R1 (arXiv:2412.19437), and models in their form such as Moonlight and Kimi K2."""

from __future__ import annotations

from typing import Any

from parallel.errors import ConfigError
from trainer.config import AttentionKind, RunConfig
from trainer.config_moe import Score
from trainer.interop.family import (
    BLOCK,
    DENSE,
    EXPERTS,
    FREE_MOE,
    IGNORED_MLA,
    ROUTER,
    Family,
    read_base,
    write_base,
)
from trainer.interop.hf_config import Fields, HfConfig
from trainer.interop.plan import AS_IS, Change, RotaryPairs

LATENT_EPS = 1e-6
"""Of the latents' norms, whatever rms_norm_eps says: the released code does not pass it on."""

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_DEFAULTS = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def read(hf: HfConfig) -> Fields:
    """Fields of a DeepSeek-V3."""
    hf.must_be("scoring_func", "sigmoid", "sigmoid", "the experts of this family are scored by sigmoid")
    hf.must_be("topk_method", "noaux_tc", "noaux_tc", "experts are chosen with a bias and inside groups")
    hf.must_be("moe_layer_freq", 1, 1, "every layer after the first dense ones has experts")
    base = read_base(hf)
    direct = "q_lora_rank" in hf.values and hf.values["q_lora_rank"] is None  # null is not the default
    rank = hf.size("q_lora_rank", default=0 if direct else 1536)
    return {
        **base,
        **{f"model.mla.{name}": hf.size(name, default=_DEFAULTS[name]) for name in _SIZES},
        "model.mla.q_lora_rank": rank,
        "model.mla.norm_eps": None if base["model.norm_eps"] == LATENT_EPS else LATENT_EPS,
        "model.num_kv_heads": base["model.num_heads"],
        "model.head_dim": hf.size("qk_rope_head_dim", default=64),
        "model.ffn_dim": hf.size("intermediate_size"),
        "layout.expert_ffn_dim": hf.size("moe_intermediate_size", default=2048),
        "layout.num_experts": hf.size("n_routed_experts", "num_local_experts", default=256),
        "layout.num_shared_experts": hf.size("n_shared_experts", default=1),
        "layout.top_k": hf.size("num_experts_per_tok", default=8),
        "layout.num_groups": hf.size("n_group", default=8),
        "layout.top_groups": hf.size("topk_group", default=4),
        "layout.first_dense_layers": hf.size("first_k_dense_replace", default=3),
        "layout.renormalize": hf.flag("norm_topk_prob", True),
        "layout.route_scale": hf.number("routed_scaling_factor", 2.5),
    }


def write(config: RunConfig) -> dict[str, Any]:
    """A DeepSeek-V3's config.json."""
    model, layout = config.model, config.layout
    mla = model.mla
    if (model.norm_eps if mla.norm_eps is None else mla.norm_eps) != LATENT_EPS:
        raise ConfigError(
            "model.mla.norm_eps",
            mla.norm_eps,
            f"this family's latent norms use {LATENT_EPS:g}, and this run's {model.norm_eps:g}",
            f"train with model.mla.norm_eps={LATENT_EPS:g}; a few steps from this checkpoint adapt it",
        )
    if layout.num_shared_experts == 0:
        raise ConfigError(
            "layout.num_shared_experts", 0, "this family has at least one", "a run with shared experts"
        )
    own = {
        "num_key_value_heads": model.num_heads,
        "q_lora_rank": mla.q_lora_rank or None,
        **{name: getattr(mla, name) for name in _SIZES},
        "intermediate_size": model.ffn_dim,
        "moe_intermediate_size": layout.expert_ffn_dim,
        "n_routed_experts": layout.num_experts,
        "n_shared_experts": layout.num_shared_experts,
        "num_experts_per_tok": layout.top_k,
        "n_group": layout.num_groups,
        "topk_group": layout.top_groups,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": layout.renormalize,
        "routed_scaling_factor": layout.route_scale,
        "first_k_dense_replace": layout.first_dense_layers,
        "moe_layer_freq": 1,
        "rope_interleave": True,
    }
    return {**write_base(DEEPSEEK_V3, config), **own, **DEEPSEEK_V3.always}


def change(leaf: str, config: RunConfig, values: dict[str, Any]) -> Change:
    """Rows that the rotary embedding turns are neighbours on disk unless config.json says otherwise."""
    mla, heads = config.model.mla, config.model.num_heads
    if values.get("rope_interleave", True) is False:
        return AS_IS
    if leaf in ("attention.wq.weight", "attention.wq_b.weight"):
        return RotaryPairs(heads=heads, before=mla.qk_nope_head_dim, rope=mla.qk_rope_head_dim)
    if leaf == "attention.wkv_a.weight":
        return RotaryPairs(heads=1, before=mla.kv_lora_rank, rope=mla.qk_rope_head_dim)
    return AS_IS


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    layout="deepseek",
    names={
        **BLOCK,
        **DENSE,
        **ROUTER,
        **EXPERTS,
        "attention.wq.weight": "self_attn.q_proj.weight",
        "attention.wq_a.weight": "self_attn.q_a_proj.weight",
        "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
        "attention.wq_b.weight": "self_attn.q_b_proj.weight",
        "attention.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
        "attention.wkv_b.weight": "self_attn.kv_b_proj.weight",
        "feed_forward.router.bias_E": "mlp.gate.e_score_correction_bias",
        "feed_forward.shared.w1.weight": "mlp.shared_experts.gate_proj.weight",
        "feed_forward.shared.w2.weight": "mlp.shared_experts.down_proj.weight",
        "feed_forward.shared.w3.weight": "mlp.shared_experts.up_proj.weight",
    },
    read=read,
    write=write,
    needs={"model.attention": AttentionKind.mla, "layout.score": Score.sigmoid},
    free=FREE_MOE
    | IGNORED_MLA
    | {"model.ffn_dim", "layout.num_shared_experts", "layout.num_groups", "layout.top_groups"}
    | {"layout.first_dense_layers", "layout.renormalize", "layout.route_scale"},
    ignored=frozenset({"model.num_kv_heads", "model.head_dim"}),
    harmless=frozenset(
        "num_key_value_heads head_dim qk_head_dim rope_interleave num_nextn_predict_layers num_mtp_layers "
        "ep_size aux_loss_alpha seq_aux".split()
    ),
    fp32=frozenset({"mlp.gate.e_score_correction_bias"}),
    always={"num_nextn_predict_layers": 0},  # Muster has no such layer to give back
    change=change,
)
