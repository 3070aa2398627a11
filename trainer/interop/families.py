"""All families, and choosing one."""

from __future__ import annotations

from collections.abc import Iterable

from parallel.errors import ConfigError
from trainer.config import RunConfig
from trainer.interop.deepseek_v3 import DEEPSEEK_V3
from trainer.interop.family import TOP, TRAINING_STATE, Family
from trainer.interop.hf_config import HARMLESS, Fields, HfConfig
from trainer.interop.llama import LLAMA
from trainer.interop.mixtral import MIXTRAL
from trainer.interop.olmoe import OLMOE
from trainer.interop.plan import Piece, Shape, expert_pieces, whole_piece
from trainer.interop.qwen3_moe import QWEN3_MOE

FAMILIES = {family.model_type: family for family in (LLAMA, MIXTRAL, QWEN3_MOE, OLMOE, DEEPSEEK_V3)}
"""By the ``model_type`` of ``config.json``."""


def family_of(hf: HfConfig) -> Family:
    """The family that a ``config.json`` names.

    Raises:
        ConfigError: Muster does not know it, or the model is not a language model of it.
    """
    name = hf.values.get("model_type")
    if name not in FAMILIES:
        raise hf.wrong("model_type", name, f"Muster knows {', '.join(FAMILIES)}", "a model of one of these")
    family = FAMILIES[name]
    for architecture in hf.values.get("architectures") or ():
        if architecture != family.architecture:
            raise hf.wrong(
                "architectures", architecture, f"must be {family.architecture}", "the language model itself"
            )
    return family


def read_fields(family: Family, hf: HfConfig) -> Fields:
    """Every field of ``model`` and ``layout`` that decides what the model computes.

    Raises:
        ConfigError: a key says something that Muster has not got, or is unknown.
    """
    fields = {**family.fixed(), **family.read(hf)}
    hf.finish(HARMLESS | family.harmless)
    return fields


def family_for(config: RunConfig) -> Family:
    """The family that can express a run's model.

    Raises:
        ConfigError: none can; the message says what keeps the nearest one from it.
    """
    sparse = config.layout.num_experts > 0
    found = {
        name: family.misfits(config)
        for name, family in FAMILIES.items()
        if sparse is ("layout.num_experts" in family.free)
    }
    name = min(found, key=lambda key: len(found[key]))
    if found[name]:
        field, value, needed = found[name][0]
        shown = [getattr(v, "value", v) for v in (value, needed)]
        raise ConfigError(
            field,
            shown[0],
            f"no family can express this model; the nearest, {name}, has {field}={shown[1]}",
            "keep it as a Muster checkpoint, or train one that fits (docs/huggingface.md lists what does)",
        )
    return FAMILIES[name]


def make_pieces(
    family: Family, config: RunConfig, values: dict[str, object], shapes: dict[str, Shape]
) -> list[Piece]:
    """Every tensor on disk of a model, in the order of the model; TRAINING_STATE has none.

    Args:
        config: resolved.
        values: of the ``config.json`` that says how the tensors are stored.
        shapes: every weight and persistent buffer of Muster's model, without ``model.``.

    Raises:
        ConfigError: a tensor of Muster's has no place in the family.
    """
    pieces: list[Piece] = []
    for name, shape in shapes.items():
        pieces += _pieces_of(family, config, values, name, shape)
    return pieces


def _pieces_of(
    family: Family, config: RunConfig, values: dict[str, object], name: str, shape: Shape
) -> Iterable[Piece]:
    if name in TOP:
        return [whole_piece(TOP[name], TOP[name], name, shape, family.change(name, config, values))]
    head, _, rest = name.partition(".")
    index, _, leaf = rest.partition(".")
    if head == "layers" and leaf in TRAINING_STATE:
        return []
    if head != "layers" or leaf not in family.names:
        raise ConfigError(
            "tensor",
            name,
            f"has no place in the family {family.model_type}",
            "see layout.balance.bias_update_rate" if leaf.endswith("bias_E") else "another layout",
        )
    layer = f"model.layers.{index}."
    hf = layer + family.names[leaf]
    if "{}" in hf:
        return expert_pieces(hf, f"{layer}mlp.experts", leaf[-2:], name, shape)
    fused = hf.replace(".block_sparse_moe.", ".mlp.")
    return [whole_piece(hf, fused, name, shape, family.change(leaf, config, values))]
