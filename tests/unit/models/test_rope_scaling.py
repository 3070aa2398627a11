"""Stretched rotary embeddings have the angles of transformers, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from parallel.errors import ConfigError
from trainer.compose import compose
from trainer.config import Machine, RopeScaling, RopeScalingConfig, resolve
from trainer.models.layers import rotary_table
from trainer.rules import validate

CASES: dict[str, tuple[RopeScalingConfig, dict[str, Any]]] = {
    "none": (RopeScalingConfig(), {"rope_type": "default"}),
    "llama3": (
        RopeScalingConfig(RopeScaling.llama3, factor=8.0, original_context=64),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": (
        RopeScalingConfig(RopeScaling.yarn, factor=4.0, original_context=64),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn with mscale": (
        RopeScalingConfig(
            RopeScaling.yarn,
            factor=40.0,
            original_context=256,
            mscale=0.707,
            mscale_all_dim=1.0,
            beta_slow=2.0,
        ),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 256,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "beta_slow": 2.0,
        },
    ),
    "yarn with a factor of its own": (
        RopeScalingConfig(RopeScaling.yarn, factor=4.0, original_context=64, attention_factor=1.3),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_table_is_that_of_transformers(name: str) -> None:
    scaling, parameters = CASES[name]
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 500.0, **parameters},
    )
    embedding = LlamaRotaryEmbedding(config)
    expected = embedding(torch.zeros(1), torch.arange(300)[None])
    found = rotary_table(300, 32, 500.0, torch.device("cpu"), scaling)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs[0])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["original_context=0"], "model.rope_scaling.original_context=0: must be above 0 positions"),
        (["factor=0.5"], "model.rope_scaling.factor=0.5: the context grows"),
        (["high_freq_factor=1"], "high_freq_factor=1.0: must be above low_freq_factor = 1.0"),
        (["beta_fast=1"], "beta_fast=1.0: must be above beta_slow = 1.0"),
    ],
)
def test_settings_that_cannot_be(overrides: list[str], message: str) -> None:
    base = ["kind=llama3", "original_context=64"]
    config = compose(
        [f"model.rope_scaling.{o}" for o in base] + [f"model.rope_scaling.{o}" for o in overrides]
    )
    with pytest.raises(ConfigError) as caught:
        validate(resolve(config, Machine(num_cpus=1)))
    assert message in str(caught.value)
