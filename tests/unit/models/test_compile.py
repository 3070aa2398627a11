"""`train.compile`: the same model, compiled once for all its blocks; an error where that cannot be."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn

from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from parallel.errors import ConfigError
from trainer.build import build_model
from trainer.compose import compose
from trainer.config import Machine, RunConfig, resolve
from trainer.models.init import initialise
from trainer.models.transformer import Losses
from trainer.rules import validate

SMALL = ["device=cpu", "model.dim=32", "model.num_heads=4", "model.ffn_dim=48", "model.num_layers=3"]
SMALL += ["model.vocab_size=64", "train.seq_len=16", "layout.first_dense_layers=1"]


def config_of(*more: str) -> RunConfig:
    return resolve(compose([*SMALL, *more]), Machine(num_cpus=1))


def trained(config: RunConfig) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A new model after one backward, its loss and its gradients."""
    model = build_model(config, LocalDispatcher())
    model.to_empty(device="cpu")
    initialise(model, whole_state(model), config.train.seed)
    tokens = torch.arange(2 * 17).view(2, 17) % 61
    losses = model(tokens[:, :-1], tokens[:, 1:], torch.zeros(2, 16, dtype=torch.int32))
    assert isinstance(losses, Losses)
    losses.cross_entropy.backward()
    return model, losses.cross_entropy.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_compute_the_same(recompute: bool) -> None:
    from torch._dynamo.utils import counters

    more = [f"train.activation_checkpointing={str(recompute).lower()}", "model.qk_norm=head"]
    _, loss, gradients = trained(config_of(*more))
    torch._dynamo.reset()
    counters.clear()
    model, found, own = trained(config_of("train.compile=true", *more))
    assert counters["stats"]["unique_graphs"] == 1, "one for all blocks"
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    for one, other in zip(own, gradients, strict=True):
        assert torch.linalg.vector_norm(one - other) <= 1e-5 * torch.linalg.vector_norm(other)
    _, again, twice = trained(config_of("train.compile=true", *more))
    assert torch.equal(found, again) and all(map(torch.equal, own, twice)), "the same bits each time"
    with torch.no_grad():
        model.eval()(torch.zeros(1, 5, dtype=torch.int64))
    assert counters["stats"]["unique_graphs"] == 1, "nothing but training is compiled"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["engine=deepspeed", "engine.zero_stage=3"],
            "DeepSpeed's ZeRO-3 gathers weights in hooks of modules",
        ),
        (["model.target=some.where:Model"], "it compiles the blocks of Muster's own model"),
    ],
    ids=["zero3", "own model"],
)
def test_where_it_cannot_be_it_is_an_error(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validate(config_of("train.compile=true", *overrides))
    assert str(caught.value).startswith("train.compile=true: ")


def test_without_a_compiler_the_error_comes_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"there is no C\+\+ compiler here \(g\+\+, clang\+\+\)"):
        build_model(config_of("train.compile=true"), LocalDispatcher())
    build_model(config_of(), LocalDispatcher())
