"""Config → objects: the only wiring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from parallel.dispatch.all_to_all import AllToAllDispatcher
from parallel.dispatch.base import Dispatcher
from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from parallel.engines.native import NativeEngine
from parallel.errors import ConfigError
from parallel.mesh import Meshes
from trainer.callbacks import Callback
from trainer.checkpoint.resume import open_checkpoint
from trainer.compose import load_frozen
from trainer.config import Device, Dtype, RunConfig
from trainer.data.tokenizer import TextTokenizer
from trainer.models.transformer import Transformer
from trainer.optim import make_adamw
from trainer.plugins import load_target


def torch_dtype(config: RunConfig) -> torch.dtype:
    """Activation dtype of a resolved config."""
    return torch.bfloat16 if config.train.dtype is Dtype.bf16 else torch.float32


def build_model(config: RunConfig, dispatcher: Dispatcher) -> nn.Module:
    """The model on the meta device: no storage, no values.

    ``model.target`` is called as ``target(config, dispatcher, **model.kwargs)`` and ``layout.target`` as
    ``target(config, layer_index, dispatcher, **layout.kwargs)``.
    """
    make_feed_forward = None
    if config.layout.target is not None:
        layout_target = cast(Callable[..., nn.Module], load_target("layout.target", config.layout.target))

        def make_feed_forward(c: RunConfig, index: int, d: Dispatcher) -> nn.Module:
            return layout_target(c, index, d, **c.layout.kwargs)

    with torch.device("meta"):
        if config.model.target is None:
            return Transformer(config, dispatcher, make_feed_forward)
        model_target = cast(Callable[..., nn.Module], load_target("model.target", config.model.target))
        return model_target(config, dispatcher, **config.model.kwargs)


def build_dispatcher(meshes: Meshes) -> Dispatcher:
    """The backend for the ep axis."""
    if meshes.dims.ep == 1:
        return LocalDispatcher()
    return AllToAllDispatcher(meshes.ep)


def build_engine(config: RunConfig, meshes: Meshes, device: torch.device) -> NativeEngine:
    """The engine, not yet prepared."""
    return NativeEngine(
        meshes,
        device,
        torch_dtype(config),
        lambda named: make_adamw(named, config.optim),
        config.engine.reshard_after_forward,
    )


def build_callbacks(config: RunConfig) -> list[Callback]:
    """The user's hooks, in order."""
    callbacks = []
    for index, entry in enumerate(config.callbacks):
        field = f"callbacks[{index}].target"
        made = cast(Callable[..., object], load_target(field, entry.target))(**entry.kwargs)
        if not isinstance(made, Callback):
            raise ConfigError(
                field,
                entry.target,
                f"makes a {type(made).__name__}, not a trainer.callbacks.Callback",
                "derive it from trainer.callbacks.Callback",
            )
        callbacks.append(made)
    return callbacks


@dataclass(frozen=True)
class Inference:
    """A checkpoint's model in one process."""

    config: RunConfig
    model: nn.Module
    tokenizer: TextTokenizer
    device: torch.device


def load_for_inference(path: Path) -> Inference:
    """Load the weights of a run's newest valid checkpoint, or of one checkpoint, into this process.

    Raises:
        ConfigError: nothing valid is there.
    """
    checkpoint = open_checkpoint(path)
    run_dir = checkpoint.path.parent.parent
    config = load_frozen(run_dir / "config.yaml")
    on_gpu = config.device is Device.cuda and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    model = build_model(config, LocalDispatcher()).to_empty(device=device)
    checkpoint.load_into(whole_state(model), prefix="model.")
    tokenizer = TextTokenizer.load(run_dir / "tokenizer.json")
    return Inference(config, model.eval(), tokenizer, device)
