"""Llama 1 to 3.3 and what copies their form (arXiv:2302.13971, arXiv:2407.21783)."""

from __future__ import annotations

from typing import Any

from parallel.errors import ConfigError
from trainer.config import RunConfig
from trainer.interop.family import (
    BLOCK,
    DENSE,
    FREE_GQA,
    GQA,
    IGNORED_MLA,
    Family,
    flatten,
    read_base,
    read_gqa,
    write_base,
    write_gqa,
)
from trainer.interop.hf_config import Fields, HfConfig


def read(hf: HfConfig) -> Fields:
    """Fields of a Llama."""
    hf.must_be("mlp_bias", False, False, "Muster's feed-forward layers have no bias")
    return {**read_base(hf), **read_gqa(hf), "model.ffn_dim": hf.size("intermediate_size")}


def write(config: RunConfig) -> dict[str, Any]:
    """A Llama's config.json."""
    model = config.model
    if model.dim % model.num_heads:
        raise ConfigError(
            "model.num_heads",
            model.num_heads,
            f"transformers asks that a Llama's heads divide model.dim = {model.dim}",
            "a run with another number of heads",
        )
    own = {"intermediate_size": model.ffn_dim, "mlp_bias": False}
    return {**write_base(LLAMA, config), **write_gqa(config), **own}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layout="dense",
    names={**BLOCK, **GQA, **DENSE},
    read=read,
    write=write,
    free=FREE_GQA | {"model.ffn_dim"},
    # Without experts the layout says nothing, but for these two.
    ignored=IGNORED_MLA
    | {name for name, _ in flatten(RunConfig()) if name.startswith("layout.")}
    - {"layout.num_experts", "layout.target"},
)
