"""The same weights give the logits of the Hugging Face models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from parallel.dispatch.local import LocalDispatcher
from trainer.build import build_model
from trainer.compose import compose
from trainer.config import Machine, RunConfig, resolve

SMALL = [
    "model.dim=32",
    "model.num_layers=3",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.ffn_dim=48",
    "model.norm_eps=1e-6",
    "data.tokenizer.vocab_size=264",
]
COMMON: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def ours(*overrides: str) -> tuple[RunConfig, nn.Module]:
    config = resolve(compose([*SMALL, *overrides]), Machine(num_cpus=1))
    model = build_model(config, LocalDispatcher())
    model.to_empty(device="cpu")
    return config, model


def copy_weights(model: nn.Module, theirs: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    """Fill every parameter of ours; ``names`` maps the leaf of ours to theirs within a layer."""
    used = set()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, target in state.items():
        parts = name.split(".")
        if parts[0] == "layers":
            leaf = ".".join(parts[2:])
            source = f"model.layers.{parts[1]}.{names[leaf]}"
        else:
            source = names[name]
        value = theirs[source]
        if "experts." in name:
            leaf = parts[-1]
            if leaf in ("w1", "w3"):  # theirs: gate and up stacked, [E, 2F, D]; ours [E, D, F]
                value = value.chunk(2, dim=1)[0 if leaf == "w1" else 1]
            value = value.transpose(1, 2)
        with torch.no_grad():
            assert target.shape == value.shape, (name, target.shape, value.shape)
            target.copy_(value)
        used.add(source)
    assert used == set(theirs), f"unused: {sorted(set(theirs) - used)}"


TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
}
GQA = {f"attention.w{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkv"}
QK_NORM = {f"attention.{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
DENSE = {
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
MOE = {
    "feed_forward.router.weight": "mlp.gate.weight",
    "feed_forward.experts.w1": "mlp.experts.gate_up_proj",
    "feed_forward.experts.w3": "mlp.experts.gate_up_proj",
    "feed_forward.experts.w2": "mlp.experts.down_proj",
}
MLA = {
    "attention.wq_a.weight": "self_attn.q_a_proj.weight",
    "attention.q_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.wq_b.weight": "self_attn.q_b_proj.weight",
    "attention.wkv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.wkv_b.weight": "self_attn.kv_b_proj.weight",
}
SHARED = {
    "feed_forward.shared.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "feed_forward.shared.w2.weight": "mlp.shared_experts.down_proj.weight",
    "feed_forward.shared.w3.weight": "mlp.shared_experts.up_proj.weight",
    "feed_forward.router.bias_E": "mlp.gate.e_score_correction_bias",
}


def llama() -> tuple[nn.Module, list[str], dict[str, str]]:
    config = transformers.LlamaConfig(**COMMON, **ROPE)
    return transformers.LlamaForCausalLM(config), ["layout=dense"], {**GQA, **DENSE}


def mixtral() -> tuple[nn.Module, list[str], dict[str, str]]:
    config = transformers.MixtralConfig(**COMMON, **ROPE, num_local_experts=8, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config), ["layout=mixtral"], {**GQA, **MOE}


def olmoe() -> tuple[nn.Module, list[str], dict[str, str]]:
    config = transformers.OlmoeConfig(
        **COMMON, **ROPE, num_experts=16, num_experts_per_tok=4, norm_topk_prob=False
    )
    overrides = ["layout.num_experts=16", "layout.top_k=4", "layout.renormalize=false", "model.qk_norm=full"]
    return transformers.OlmoeForCausalLM(config), overrides, {**GQA, **QK_NORM, **MOE}


def deepseek_v3() -> tuple[nn.Module, list[str], dict[str, str]]:
    config = transformers.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        **ROPE,
        rope_interleave=False,
        moe_intermediate_size=12,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
    )
    overrides = [
        "layout=deepseek",
        "layout.num_experts=16",
        "layout.top_k=4",
        "layout.num_groups=4",
        "layout.top_groups=2",
        "layout.route_scale=2.5",
        "model.attention=mla",
        "model.num_kv_heads=4",
        "model.mla={q_lora_rank: 24, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 4, "
        "v_head_dim: 8}",
    ]
    model = transformers.DeepseekV3ForCausalLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return model, overrides, {**MLA, **MOE, **DENSE, **SHARED}


@pytest.mark.parametrize("family", [llama, mixtral, olmoe, deepseek_v3], ids=lambda f: f.__name__)
def test_logits_equal_those_of_transformers(family: Any) -> None:
    torch.manual_seed(0)
    theirs, overrides, names = family()
    theirs.eval()
    _, model = ours(*overrides)
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("inv_freq")}
    copy_weights(model, state, {**TOP, **BLOCK, **names})
    tokens = torch.randint(0, 264, (2, 19))
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = model(tokens)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
