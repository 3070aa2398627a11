"""What is wrong with a plug-in is said where its object is built, in the user's terms."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from parallel.dispatch.base import Dispatcher
from parallel.dispatch.local import LocalDispatcher
from parallel.errors import ConfigError
from trainer.build import build_callbacks, build_model
from trainer.callbacks import Callback
from trainer.compose import compose
from trainer.config import Machine, RunConfig, resolve

HERE = "tests.commands.test_plugin_mistakes"


class Raises(Callback):
    def __init__(self) -> None:
        raise RuntimeError("no such sensor")


class Plain:
    pass


class Model(nn.Module):
    """Every way of being wrong that would otherwise show late, one a time."""

    def __init__(self, config: RunConfig, dispatcher: Dispatcher, fault: str = "none") -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        if fault == "tied":
            self.head.weight = self.embedding.weight
        if fault == "buffer":
            self.register_buffer("mask", self.embedding.weight[0], persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None) -> Any:
        return self.head(self.embedding(tokens))


class FilledModel(Model):
    def init_buffers(self) -> None:
        self.get_buffer("mask").fill_(1.0)


class Layer(nn.Module):
    def __init__(self, config: RunConfig, layer_index: int, dispatcher: Dispatcher) -> None:
        super().__init__()

    def forward(self, x: Tensor, targets: Tensor, rope: Tensor) -> Tensor:
        return x


def config_of(*overrides: str) -> RunConfig:
    composed = compose(["device=cpu", "model.dim=16", "model.num_layers=1", "model.ffn_dim=16", *overrides])
    return resolve(composed, Machine(num_cpus=1))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ('{target: "HERE:Rises"}', r"callbacks\[0\].target=HERE:Rises: .* Fix: .*HERE:Raises"),
        ('{target: "HERE:Raises"}', r"raised RuntimeError: no such sensor \(.*test_plugin_mistakes.py:\d+\)"),
        ('{target: "HERE:Raises", kwargs: {port: 3}}', r"Raises\(port=…\): .*'port'.*callbacks\[0\].kwargs"),
        ('{target: "HERE:Plain"}', "makes a Plain, not a trainer.callbacks.Callback"),
        ('{target: "HERE:HERE"}', "is a str, not callable"),
    ],
)
def test_callbacks(callback: str, message: str) -> None:
    config = config_of(f"callbacks=[{callback.replace('HERE:', HERE + ':')}]")
    with pytest.raises(ConfigError, match=message.replace("HERE:", HERE + ":")):
        build_callbacks(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.target=HERE:Model", "+model.kwargs.width=3"], "'width'. Fix: .*model.kwargs"),
        (["model.target=HERE:Raises"], "called as Raises.RunConfig, LocalDispatcher.: too many"),
        (["model.target=HERE:config_of"], "raised AttributeError"),
        (
            ["model.target=HERE:Model", "+model.kwargs.fault=tied"],
            "embedding.weight and head.weight are one parameter",
        ),
        (["model.target=HERE:Model", "+model.kwargs.fault=buffer"], r"buffer mask .* init_buffers\(\)"),
        (["model.target=HERE:Model", "eval.sample_tokens=4"], "eval.sample_tokens=4: .* without targets"),
        (["layout.target=HERE:Layer"], r"forward\(x: .*rope"),
        (["layout.target=HERE:Plain"], "called as Plain.RunConfig, int, LocalDispatcher."),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_models_and_layers(overrides: list[str], message: str) -> None:
    config = config_of(*(override.replace("HERE", HERE) for override in overrides))
    with pytest.raises(ConfigError, match=message):
        build_model(config, LocalDispatcher())


def test_buffers_that_are_filled_are_welcome() -> None:
    config = config_of(f"model.target={HERE}:FilledModel", "+model.kwargs.fault=buffer")
    assert isinstance(build_model(config, LocalDispatcher()), FilledModel)
