"""What a family of published models is to Muster: names of tensors, and which configs it can express.

A family fixes or frees every field of ``model`` and ``layout`` that decides what a model computes. Import sets
the fixed ones and reads the free ones from ``config.json``; export refuses a run whose fixed fields differ.
A field that is added to the schema later is fixed at its default until a family frees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from trainer.config import ModelConfig, RunConfig
from trainer.interop.hf_config import Fields, HfConfig, read_rope, write_rope
from trainer.interop.plan import AS_IS, Change


def flatten(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Dotted fields and values of the ``model`` and ``layout`` sections."""

    def walk(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in vars(section).items():
            if hasattr(value, "__dataclass_fields__"):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    for section in ("model", "layout"):
        yield from walk(getattr(config, section), f"{section}.")


TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""Muster's tensors outside of the layers → their names on disk."""

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
ROUTER = {"feed_forward.router.weight": "mlp.gate.weight"}
EXPERTS = {
    "feed_forward.experts.w1": "mlp.experts.{}.gate_proj.weight",
    "feed_forward.experts.w2": "mlp.experts.{}.down_proj.weight",
    "feed_forward.experts.w3": "mlp.experts.{}.up_proj.weight",
}
"""Stacked experts → the name of expert {} on disk, in the published form."""

TRAINING_STATE = frozenset({"feed_forward.router.load_E"})
"""Buffers within a layer that only training reads; a model that goes out does without them."""

NEUTRAL = frozenset(
    "model.name model.init_std model.kwargs layout.name layout.granularity layout.kwargs layout.jitter "
    "layout.sample_second layout.drop_by".split()
) | {name for name, _ in flatten(RunConfig()) if name.startswith("layout.balance.")}
"""Fields that say how a model is trained, not what it computes."""
_FREE = frozenset(
    "model.vocab_size model.dim model.num_layers model.num_heads model.rope_theta model.norm_eps "
    "model.tied_embeddings".split()
) | {f"model.rope_scaling.{name}" for name in vars(ModelConfig().rope_scaling)}
FREE_GQA = frozenset({"model.num_kv_heads", "model.head_dim"})
FREE_MOE = frozenset({"layout.num_experts", "layout.top_k", "layout.expert_ffn_dim"})
IGNORED_MLA = frozenset(f"model.mla.{name}" for name in vars(ModelConfig().mla))


def _as_is(leaf: str, config: RunConfig, values: dict[str, Any]) -> Change:
    return AS_IS


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: as ``config.json`` says it.
        architecture: the class in transformers.
        layout: the choice of ``conf/layout`` whose balancing an imported model is trained with.
        names: Muster's tensors within a layer → their names on disk within a layer; ``{}`` an expert's index.
        read: free fields from a ``config.json``.
        write: a ``config.json`` in its published form, or ConfigError where it cannot say what a run computes.
        needs: fixed fields whose value is not the schema's default.
        free: fields that ``read`` gives, besides those of every family.
        ignored: fields that such a model does not look at.
        harmless: keys of ``config.json`` that such a model does not look at.
        fp32: names on disk, within a layer, of what is kept in fp32 whatever the other tensors are in.
        always: keys that every export has so, also where the model's own config.json is given back.
        change: how a tensor is stored otherwise on disk than in Muster; (leaf, config, config.json).
    """

    model_type: str
    architecture: str
    layout: str
    names: dict[str, str]
    read: Callable[[HfConfig], Fields]
    write: Callable[[RunConfig], dict[str, Any]]
    needs: Fields = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    harmless: frozenset[str] = frozenset()
    fp32: frozenset[str] = frozenset()
    always: dict[str, Any] = field(default_factory=dict)
    change: Callable[[str, RunConfig, dict[str, Any]], Change] = _as_is

    def fixed(self) -> Fields:
        """Fields that every model of this family has the same, with their values."""
        blank = dict(flatten(RunConfig()))
        loose = NEUTRAL | _FREE | self.free | self.ignored
        return {name: self.needs.get(name, value) for name, value in blank.items() if name not in loose}

    def misfits(self, config: RunConfig) -> list[tuple[str, Any, Any]]:
        """(field, value there, value it should have) of what such a model cannot be."""
        values = dict(flatten(config))
        return [(name, values[name], value) for name, value in self.fixed().items() if values[name] != value]


def read_base(hf: HfConfig, theta: float = 10000.0, eps: float = 1e-6) -> Fields:
    """The fields of every family. ``theta``, ``eps``: what transformers takes where the key is absent."""
    hf.must_be("hidden_act", "silu", "silu", "Muster's gated layers are SwiGLU")
    hf.must_be("attention_bias", False, False, "Muster's projections have no bias")
    hf.must_be(
        "quantization_config", None, None, "the weights are quantised; convert the model to bf16 first"
    )
    return {
        "model.vocab_size": hf.size("vocab_size"),
        "model.dim": hf.size("hidden_size"),
        "model.num_layers": hf.size("num_hidden_layers"),
        "model.num_heads": hf.size("num_attention_heads"),
        "model.norm_eps": hf.number("rms_norm_eps", eps),
        "model.tied_embeddings": hf.flag("tie_word_embeddings", False),
        **read_rope(hf, theta),
    }


def read_gqa(hf: HfConfig, kv_heads: int | None = None, with_head_dim: bool = True) -> Fields:
    """Key heads and head width. ``kv_heads``: where the key is absent; None: as many as query heads."""
    heads = hf.size("num_attention_heads")
    width = hf.size("hidden_size") // heads
    return {
        "model.num_kv_heads": hf.size("num_key_value_heads", default=kv_heads or heads),
        "model.head_dim": hf.size("head_dim", default=width) if with_head_dim else width,
    }


def write_base(family: Family, config: RunConfig) -> dict[str, Any]:
    """The keys of every family."""
    model = config.model
    scaling = model.rope_scaling
    stretched = int(scaling.factor * scaling.original_context)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "max_position_embeddings": max(config.train.seq_len, stretched),
        "use_cache": True,
        **write_rope(model),
    }


def write_gqa(config: RunConfig) -> dict[str, Any]:
    """Key heads and head width."""
    return {"num_key_value_heads": config.model.num_kv_heads, "head_dim": config.model.head_dim}
