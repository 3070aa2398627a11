"""Published models build on the meta device with their published parameter counts."""

import pytest
import torch

from parallel.dispatch.local import LocalDispatcher
from trainer.build import build_model
from trainer.compose import compose
from trainer.config import Machine, resolve
from trainer.models.cost import model_cost

# Counts of the released checkpoints; DeepSeek-V3's 671,026,419,200 counts the 58 · 256 router biases too.
PUBLISHED = {
    "mixtral_8x7b": 46_702_792_704,
    "olmoe_1b_7b": 6_919_161_856,
    "deepseek_v3": 671_026_419_200,
    "llama3_8b": 8_030_261_248,
    "llama3_405b": 405_853_388_800,
}
ACTIVE_BILLIONS = {"mixtral_8x7b": 12.9, "olmoe_1b_7b": 1.3, "deepseek_v3": 37.5, "llama3_8b": 8.0}


def build(name: str):
    config = resolve(compose([f"model={name}"]), Machine(num_cpus=2))
    return config, build_model(config, LocalDispatcher())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name: str) -> None:
    _, model = build(name)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.is_meta for t in tensors)
    assert sum(t.numel() for t in tensors) == PUBLISHED[name]


def test_switch_c_has_1571_billion_parameters() -> None:
    _, model = build("switch_c")
    assert round(sum(p.numel() for p in model.parameters()) / 1e9) == 1571


@pytest.mark.parametrize("name", ACTIVE_BILLIONS)
def test_active_parameters(name: str) -> None:
    config, model = build(name)
    assert model_cost(model, config).num_active / 1e9 == pytest.approx(ACTIVE_BILLIONS[name], abs=0.06)


def test_flops_of_a_dense_model_are_six_a_parameter_and_attention() -> None:
    config, model = build("llama3_8b")
    without_embedding = PUBLISHED["llama3_8b"] - 128256 * 4096
    attention = 6 * 32 * 4096 * config.train.seq_len
    assert model_cost(model, config).flops_per_token == 6 * without_embedding + attention


def test_meta_build_uses_no_memory() -> None:
    _, model = build("llama3_405b")
    assert {p.device for p in model.parameters()} == {torch.device("meta")}
