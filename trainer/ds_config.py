"""The rules of ``engine=deepspeed``, and of a user's own ``ds_config`` file beside it. Torch-free.

Much of what DeepSpeed's JSON says is said by fields of the run as well. Such a key may stand in the file if
both agree (or it is ``"auto"``); what only concerns how fast DeepSpeed works is handed on; everything else
would change what is computed, or has not been proven not to, and is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parallel.dims import ParallelDims
from parallel.errors import ConfigError
from trainer.config import Dtype, EngineName, RunConfig, require

STAGES = (0, 1, 2, 3)

_HANDED_ON = {
    "wall_clock_breakdown",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.overlap_comm",
    "zero_optimization.sub_group_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
}
_OPTIMIZERS = ("Adam", "AdamW")


def accumulation(config: RunConfig, dims: ParallelDims) -> int:
    """Micro-batches of one rank in a step of a resolved config."""
    return -(-config.train.global_batch // (config.train.micro_batch * dims.dp))


def check_deepspeed(config: RunConfig, dims: ParallelDims) -> None:
    """The rules that join the engine's fields with the rest.

    Raises:
        ConfigError: the first that does not hold.
    """
    engine = config.engine
    if engine.name is not EngineName.deepspeed:
        for field in ("zero_stage", "ds_config"):
            value = getattr(engine, field)
            require(
                value is None,
                f"engine.{field}",
                value,
                f"only engine=deepspeed reads it, and engine.name={engine.name.value}",
                f"engine=deepspeed, or engine.{field}=null",
            )
        return
    require(
        engine.zero_stage in STAGES,
        "engine.zero_stage",
        engine.zero_stage,
        "ZeRO has the stages 0, 1, 2 and 3",
        "engine.zero_stage=2",
    )
    require(
        engine.reshard_after_forward,
        "engine.reshard_after_forward",
        "false",
        "belongs to engine=native; whether DeepSpeed frees gathered parameters is engine.zero_stage",
        "engine.reshard_after_forward=true and engine.zero_stage=2, which keeps them",
    )
    require(
        dims.dp_replicate == 1,
        "parallel.dp_replicate",
        dims.dp_replicate,
        "DeepSpeed shards over all data-parallel ranks and knows no replicas of that (engine.name=deepspeed)",
        "parallel.dp_replicate=1 parallel.dp_shard=-1, or engine=native",
    )
    deepspeed_settings(config, dims)


def deepspeed_settings(config: RunConfig, dims: ParallelDims) -> dict[str, Any]:
    """What ``engine.ds_config`` asks of DeepSpeed beyond the run's own fields; empty without a file.

    Raises:
        ConfigError: the file cannot be read, contradicts a field, or has a key that is not allowed.
    """
    path = config.engine.ds_config
    if path is None:
        return {}
    given = dict(_flatten(_read(path)))
    agreed = _said_twice(config, dims)
    settings: dict[str, Any] = {}
    for key, value in given.items():
        if key in agreed:
            _check_agreement(path, key, value, *agreed[key])
        elif key in _HANDED_ON:
            section, _, leaf = key.rpartition(".")
            (settings.setdefault(section, {}) if section else settings)[leaf] = value
        elif not key.startswith("optimizer."):
            raise ConfigError(
                "engine.ds_config",
                path,
                f"its key {key} is not one that is proven to leave the results as they are",
                f"remove {key} from the file",
            )
    optimizer = _optimizer(path, given, config)
    return {**settings, "optimizer": optimizer} if optimizer else settings


def unrepeated(path: str) -> dict[str, Any]:
    """A ds_config file's content without what fields of the run say too, for a run that changes those."""
    content: dict[str, Any] = {}
    for key, value in _flatten(_read(path)):
        own = key.startswith("optimizer.") and key.rpartition(".")[2] in ("type", *_FORMS)
        if own or key in _HANDED_ON:
            *sections, leaf = key.split(".")
            place = content
            for section in sections:
                place = place.setdefault(section, {})
            place[leaf] = value
    return content


_FORMS = ("torch_adam", "adam_w_mode")


def _said_twice(config: RunConfig, dims: ParallelDims) -> dict[str, tuple[str, Any]]:
    """DeepSpeed's key → the field that says the same, and what it says."""
    train, optim = config.train, config.optim
    return {
        "train_batch_size": ("train.global_batch", train.global_batch),
        "train_micro_batch_size_per_gpu": ("train.micro_batch", train.micro_batch),
        "gradient_accumulation_steps": (
            f"train.global_batch / (train.micro_batch · dp {dims.dp})",
            accumulation(config, dims),
        ),
        "gradient_clipping": ("optim.max_grad_norm", optim.max_grad_norm),
        "zero_optimization.stage": ("engine.zero_stage", config.engine.zero_stage),
        "bf16.enabled": ("train.dtype", train.dtype is Dtype.bf16),
        "fp16.enabled": ("train.dtype", False),
        "optimizer.params.lr": ("optim.lr", optim.lr),
        "optimizer.params.betas": ("[optim.beta1, optim.beta2]", [optim.beta1, optim.beta2]),
        "optimizer.params.eps": ("optim.eps", optim.eps),
        "optimizer.params.weight_decay": ("optim.weight_decay", optim.weight_decay),
    }


def _check_agreement(path: str, key: str, value: Any, field: str, ours: Any) -> None:
    if value in ("auto", ours) and isinstance(value, bool) in (isinstance(ours, bool), value == "auto"):
        return
    says = f"it says {key}={json.dumps(value)}"
    if field == "train.dtype":
        kind = key.partition(".")[0]
        other = "fp32 or bf16" if kind == "fp16" else ("bf16" if ours else "not bf16")
        fix = f"train.dtype={kind}" if kind == "bf16" and value else f"remove {key}"
        raise ConfigError(
            "engine.ds_config", path, f"{says}, but train.dtype is {other}", f"{fix} (both agree)"
        )
    fix = f"{key}={json.dumps(ours)} in the file" + (f", or {field}={value}" if " " not in field else "")
    raise ConfigError("engine.ds_config", path, f"{says}, but {field}={ours}", fix)


def _optimizer(path: str, given: dict[str, Any], config: RunConfig) -> dict[str, Any] | None:
    """DeepSpeed's own optimizer, if the file names one, with the run's figures."""
    own = {
        key.removeprefix("optimizer."): value for key, value in given.items() if key.startswith("optimizer.")
    }
    if not own:
        return None
    kind, optim = own.pop("type", None), config.optim
    if kind not in _OPTIMIZERS:
        known = " or ".join(_OPTIMIZERS)
        raise ConfigError(
            "engine.ds_config",
            path,
            f"it says optimizer.type={json.dumps(kind)}; checkpoints know the state of {known}",
            'optimizer.type="AdamW", or no optimizer in the file',
        )
    agreed = ("params.lr", "params.betas", "params.eps", "params.weight_decay")
    for name, value in own.items():
        if name not in agreed and name.removeprefix("params.") not in _FORMS:
            raise ConfigError(
                "engine.ds_config",
                path,
                f"its key optimizer.{name} is not one that is proven to leave the results as they are",
                f"remove optimizer.{name} from the file",
            )
        if name == "params.torch_adam" and value is not True:
            raise ConfigError(
                "engine.ds_config",
                path,
                "it says optimizer.params.torch_adam=false: DeepSpeed's fused Adam is compiled at every start "
                "on a new machine, and keeps its state in a form that no other engine reads",
                "optimizer.params.torch_adam=true",
            )
    params = {
        "lr": optim.lr,
        "betas": [optim.beta1, optim.beta2],
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "torch_adam": True,
    }
    if "params.adam_w_mode" in own:
        params["adam_w_mode"] = own["params.adam_w_mode"]
    return {"type": kind, "params": params}


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        relation = f"cannot be read as JSON: {error}"
        raise ConfigError(
            "engine.ds_config", path, relation, "give a DeepSpeed JSON file, or null"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            "engine.ds_config", path, "is not a JSON object", "give a DeepSpeed JSON file, or null"
        )
    return content


def _flatten(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        found += (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
        )
    return found
