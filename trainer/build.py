"""Config → objects: the only wiring."""

from __future__ import annotations

import inspect
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from parallel.dispatch.all_to_all import AllToAllDispatcher
from parallel.dispatch.base import Dispatcher
from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import Engine, whole_state
from parallel.errors import ConfigError
from parallel.exchange_check import ExchangeCheck
from parallel.exchange_timer import ExchangeTimer
from parallel.mesh import Meshes
from trainer.callbacks import Callback
from trainer.checkpoint.resume import Checkpoint
from trainer.config import Device, Dtype, EngineName, RunConfig, Sharding
from trainer.data.tokenizer import TextTokenizer
from trainer.ds_config import accumulation, deepspeed_settings
from trainer.models.init import fill_buffers
from trainer.models.transformer import Transformer, default_feed_forward, takes
from trainer.optim import make_adamw
from trainer.plugins import call_target


def torch_dtype(config: RunConfig) -> torch.dtype:
    """Activation dtype of a resolved config."""
    return torch.bfloat16 if config.train.dtype is Dtype.bf16 else torch.float32


def build_model(config: RunConfig, dispatcher: Dispatcher) -> nn.Module:
    """The model on the meta device: no storage, no values.

    ``model.target`` is called as ``target(config, dispatcher, **model.kwargs)`` and ``layout.target`` as
    ``target(config, layer_index, dispatcher, **layout.kwargs)``.

    Raises:
        ConfigError: a target cannot be called so, raised, or made something that is no such module.
    """
    if config.train.compile:
        _check_compiler(config)
    with torch.device("meta"):
        if config.model.target is None:
            return Transformer(config, dispatcher, _feed_forward)
        target = config.model.target
        made = call_target("model.target", target, config, dispatcher, **config.model.kwargs)
    model = _module("model.target", target, made, 3, "forward(tokens, targets=None, document_ids=None)")
    _check_own_model(model, config)
    return model


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use for a CPU; None: there is none."""
    wanted = os.environ.get("CXX")
    return next(filter(shutil.which, [wanted] if wanted else ["g++", "clang++", "c++"]), None)


def _check_compiler(config: RunConfig) -> None:
    """Else the first step would end in an error of the compiler's."""
    if config.device is Device.cpu and cpp_compiler() is None:
        named = os.environ.get("CXX", "g++, clang++")
        raise ConfigError(
            "train.compile",
            "true",
            f"there is no C++ compiler here ({named}), which torch.compile needs on a CPU",
            "train.compile=false, or install g++ (or name one in the environment variable CXX)",
        )


def _feed_forward(config: RunConfig, index: int, dispatcher: Dispatcher) -> nn.Module:
    make = default_feed_forward if config.layout.target is None else _target_feed_forward
    return make(config, index, dispatcher.at_layer(index))


def _target_feed_forward(config: RunConfig, index: int, dispatcher: Dispatcher) -> nn.Module:
    target = config.layout.target
    assert target is not None
    made = call_target("layout.target", target, config, index, dispatcher, **config.layout.kwargs)
    num_tensors = 1 if isinstance(made, nn.Module) and takes(made, 1) else 2
    return _module("layout.target", target, made, num_tensors, "forward(x) or forward(x, positions)")


def _module(field: str, target: str, made: object, num_tensors: int, form: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        relation = f"made a {type(made).__name__}, not a torch.nn.Module"
        raise ConfigError(field, target, relation, "return a module")
    if not takes(made, num_tensors):
        given = f"forward{inspect.signature(made.forward)}"
        raise ConfigError(
            field, target, f"its module is called as {form} and has {given}", "give it that form"
        )
    return made


def _check_own_model(model: nn.Module, config: RunConfig) -> None:
    """What would otherwise only show after hours, or as wrong weights."""
    target = str(config.model.target)
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in names:
            raise ConfigError(
                "model.target",
                target,
                f"{names[parameter]} and {name} are one parameter, which sharding would tear in two",
                f"keep {names[parameter]} alone and use it in both places (torch.nn.functional.linear)",
            )
        names[parameter] = name
    persistent = model.state_dict(keep_vars=True).keys()
    loose = [name for name, _ in model.named_buffers() if name not in persistent]
    if loose and not any(hasattr(module, "init_buffers") for module in model.modules()):
        raise ConfigError(
            "model.target",
            target,
            f"buffer {loose[0]} was made on the meta device, is in no checkpoint and so never gets its values",
            "write it in a method init_buffers(), which is called once there is storage",
        )
    if config.eval.sample_tokens and not takes(model, 1):
        raise ConfigError(
            "eval.sample_tokens",
            config.eval.sample_tokens,
            f"model.target={target} cannot be called without targets, which is how it would give logits",
            "eval.sample_tokens=0, or forward(tokens, targets=None, document_ids=None)",
        )


def build_dispatcher(
    meshes: Meshes,
    check: ExchangeCheck | None = None,
    budget: int | None = None,
    timer: ExchangeTimer | None = None,
) -> Dispatcher:
    """The backend for the ep axis.

    Args:
        budget: ``parallel.max_tokens_in_flight``.
    """
    if meshes.dims.ep == 1:
        return LocalDispatcher(budget)
    return AllToAllDispatcher(meshes.ep, check, budget=budget, timer=timer)


def build_exchange_timer(meshes: Meshes, device: torch.device) -> ExchangeTimer | None:
    """Who times the exchanges of the ep axis; None where there are none."""
    return ExchangeTimer(meshes.ep, device) if meshes.dims.ep > 1 else None


def build_exchange_check(
    config: RunConfig, meshes: Meshes, rank: int, store: dist.Store
) -> ExchangeCheck | None:
    """The check of every exchange, where it is asked for: by the config, or for one launch by the environment.

    Args:
        store: that all ranks share, with a prefix of its own for this generation.
    """
    if not config.resilience.check_exchanges and os.environ.get("MUSTER_CHECK_EXCHANGES") != "1":
        return None
    ranks = dist.get_process_group_ranks(meshes.ep)
    timeout = config.resilience.collective_timeout_seconds
    return ExchangeCheck(store, rank, ranks, meshes.dims.world_size, timeout)


def build_engine(config: RunConfig, meshes: Meshes, device: torch.device) -> Engine:
    """The engine, not yet prepared. Only the chosen one is imported.

    Raises:
        ConfigError: the launcher was told otherwise than the config (engine=accelerate).
    """

    def optimizer(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return make_adamw(named, config.optim)

    if config.engine.name is EngineName.deepspeed:
        from parallel.engines.deepspeed import DeepSpeedEngine

        assert config.engine.zero_stage is not None, "the rules ask for it"
        return DeepSpeedEngine(
            meshes,
            device,
            optimizer,
            config.engine.zero_stage,
            config.train.micro_batch,
            accumulation(config, meshes.dims),
            deepspeed_settings(config, meshes.dims),
        )
    arguments = (meshes, device, torch_dtype(config), optimizer, config.engine.reshard_after_forward)
    if config.engine.name is EngineName.accelerate:
        from parallel.engines.accelerate import AccelerateEngine

        sharding = config.engine.sharding
        wanted = sharding is Sharding.fsdp2 or (sharding is Sharding.auto and device.type == "cuda")
        return AccelerateEngine(*arguments, shard=wanted and meshes.dims.dp_shard > 1)
    from parallel.engines.native import NativeEngine

    return NativeEngine(*arguments)


def build_callbacks(config: RunConfig) -> list[Callback]:
    """The user's hooks, in order."""
    callbacks = []
    for index, entry in enumerate(config.callbacks):
        field = f"callbacks[{index}].target"
        made = call_target(field, entry.target, **entry.kwargs)
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
    """A checkpoint's model, whole in this process or this rank's part of it; ``checkpoint`` is where it is from."""

    config: RunConfig
    model: nn.Module
    tokenizer: TextTokenizer
    device: torch.device
    checkpoint: Checkpoint


def load_for_inference(
    checkpoint: Checkpoint, config: RunConfig, device: torch.device, meshes: Meshes | None = None
) -> Inference:
    """Load a checkpoint's weights: no gradients, no optimizer.

    Args:
        config: the run's, with the layout that is wanted here.
        meshes: of the ranks that hold the model between them, whatever engine trained it; None: this process
            holds all of it.

    Raises:
        ConfigError: it does not fit the config, a file of it has changed, or there is no tokenizer.
    """
    dispatcher = LocalDispatcher() if meshes is None else build_dispatcher(meshes)
    model = build_model(config, dispatcher)
    if meshes is None:
        model.to_empty(device=device)
        fill_buffers(model)
        checkpoint.load_into(whole_state(model), prefix="model.")
    else:
        from parallel.engines.native import NativeEngine

        engine = NativeEngine(
            meshes,
            device,
            torch_dtype(config),
            # An optimizer without state: nothing is allocated for it.
            lambda named: torch.optim.SGD([parameter for _, parameter in named]),
            config.engine.reshard_after_forward,
        )
        engine.prepare(model)
        fill_buffers(engine.model)
        weights = (piece for piece in engine.named_state() if piece.name.startswith("model."))
        checkpoint.load_into(weights, prefix="model.")
        model = engine.model
    tokenizer = TextTokenizer.load(run_of(checkpoint) / "tokenizer.json", field="tokenizer")
    return Inference(config, model.eval(), tokenizer, device, checkpoint)


def run_of(checkpoint: Checkpoint) -> Path:
    """The run directory that a checkpoint stands in."""
    return checkpoint.path.parent.parent
