"""Small models of every family as transformers makes and saves them, and their tensors as they are on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.data.tokenizer import TextTokenizer

COMMON: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.8,
    "mscale_all_dim": 1.0,
}
DEEPSEEK: dict[str, Any] = {
    **COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 12,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}


def llama(**more: Any) -> nn.Module:
    values = {**COMMON, "rope_parameters": dict(DEFAULT), **more}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))


def mixtral(**more: Any) -> nn.Module:
    values = {**COMMON, "rope_parameters": dict(DEFAULT), "num_local_experts": 4, **more}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**values))


def qwen3_moe(**more: Any) -> nn.Module:
    values = {
        **COMMON,
        "rope_parameters": dict(DEFAULT),
        "head_dim": 12,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "norm_topk_prob": True,
        **more,
    }
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**values))


def olmoe(**more: Any) -> nn.Module:
    values = {**COMMON, "rope_parameters": dict(DEFAULT), "num_experts": 8, "num_experts_per_tok": 3, **more}
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**values))


def deepseek_v3(**more: Any) -> nn.Module:
    values = {**DEEPSEEK, "rope_parameters": dict(YARN), **more}
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**values))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return model


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama tied, stretched": lambda: llama(
        tie_word_embeddings=True, rope_parameters=dict(LLAMA3), head_dim=12
    ),
    "mixtral": mixtral,
    "qwen3_moe, first layer dense": lambda: qwen3_moe(mlp_only_layers=[0]),
    "qwen3_moe, every second layer": lambda: qwen3_moe(
        decoder_sparse_step=2, num_hidden_layers=4, norm_topk_prob=False
    ),
    "olmoe": olmoe,
    "deepseek_v3": deepseek_v3,
    "deepseek_v3, direct queries": lambda: deepseek_v3(
        q_lora_rank=None, rope_interleave=False, rope_parameters=dict(DEFAULT), rms_norm_eps=1e-5
    ),
}
"""Every family, and what there is of choices inside one."""


@cache
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train([Path(__file__).read_text()], 260)


def save(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    """As ``save_pretrained`` writes it, norms off one, with a tokenizer."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder, **how)
    tokenizer().save(folder / "tokenizer.json")
    return folder


def make(variant: str, folder: Path, **how: Any) -> Path:
    """Save one of VARIANTS, drawn from a fixed seed."""
    torch.manual_seed(0)
    return save(VARIANTS[variant](), folder, **how)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = load_file(file)
        assert not found.keys() & loaded.keys()
        found |= loaded
    return found


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
