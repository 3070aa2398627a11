"""The rules between the fields of a config. Reads only; torch-free."""

from __future__ import annotations

from typing import Any

from parallel.dims import ParallelDims, divisors, nearest
from trainer.config import (
    AttentionKind,
    Device,
    EngineName,
    ModelConfig,
    RopeScaling,
    RopeScalingConfig,
    RunConfig,
    Schedule,
    Sharding,
    Source,
    check_batch,
    parallel_dims,
    profiled_steps,
    require,
)
from trainer.config_moe import HealthConfig
from trainer.cure.rules import check_cure
from trainer.ds_config import check_deepspeed
from trainer.launchers import check_launcher
from trainer.layout_rules import check_layout
from trainer.survival_rules import check_survival


def validate(config: RunConfig) -> None:
    """Check every rule that joins fields of a resolved config. Reads only.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    dims = parallel_dims(config)
    _check_ranges(config)
    check_batch(config, dims.dp)
    _check_model(config.model)
    if config.layout.num_experts:
        require(
            config.layout.name != "dense",
            "layout.num_experts",
            config.layout.num_experts,
            f"layout=dense has no experts, but model={config.model.name} or an override asks for some",
            "layout=mixtral, or layout.num_experts=0",
        )
        check_layout(config, dims)
    else:
        require(
            dims.ep == 1,
            "parallel.ep",
            dims.ep,
            f"layout={config.layout.name} has no experts to spread over ep ranks",
            "parallel.ep=1 or a layout with experts (layout=mixtral)",
        )
    _check_budget(config)
    check_cure(config)
    _check_engine(config)
    _check_compile(config)
    profiled_steps(config)
    _check_data(config, dims)
    _check_optim(config)
    _check_health(config)
    check_deepspeed(config, dims)
    check_launcher(config)
    check_survival(config)
    for index, callback in enumerate(config.callbacks):
        _check_dotted(f"callbacks[{index}].target", callback.target)
    for where in ("model", "layout", "data"):
        target = getattr(config, where).target
        if target is not None:
            _check_dotted(f"{where}.target", target)


_POSITIVE = (
    "model.dim model.num_layers model.num_heads model.num_kv_heads model.ffn_dim model.head_dim "
    "layout.granularity layout.moe_every train.global_batch train.micro_batch train.seq_len "
    "train.num_threads eval.max_rows logger.every health.window data.tokenizer.vocab_size"
).split()
_NOT_NEGATIVE = (
    "layout.num_experts layout.num_shared_experts layout.num_zero_experts layout.num_copy_experts "
    "layout.first_dense_layers layout.logit_norm layout.jitter layout.balance.coefficient "
    "layout.balance.router_z layout.balance.bias_update_rate optim.lr optim.weight_decay "
    "optim.max_grad_norm optim.warmup_steps optim.decay_steps eval.every eval.sample_tokens "
    "health.every health.maps_every health.dead_steps health.trace_every "
    "train.steps train.seed"
).split()


def _get(config: RunConfig, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = getattr(node, part)
    return node


def _check_ranges(config: RunConfig) -> None:
    for path in _POSITIVE:
        value = _get(config, path)
        require(value > 0, path, value, "must be above 0", f"{path}=1")
    for path in _NOT_NEGATIVE:
        value = _get(config, path)
        require(value >= 0, path, value, "must not be negative", f"{path}=0")


def _check_model(model: ModelConfig) -> None:
    require(
        model.vocab_size == -1 or model.vocab_size > 0,
        "model.vocab_size",
        model.vocab_size,
        "must be above 0, or -1 for the tokenizer's",
        "model.vocab_size=-1",
    )
    if model.target is not None:
        return
    if model.attention is AttentionKind.gqa:
        require(
            model.num_heads % model.num_kv_heads == 0,
            "model.num_kv_heads",
            model.num_kv_heads,
            f"must divide model.num_heads = {model.num_heads}",
            f"model.num_kv_heads={nearest(model.num_kv_heads, divisors(model.num_heads))}",
        )
        require(
            model.head_dim % 2 == 0,
            "model.head_dim",
            model.head_dim,
            "rotary embeddings turn pairs of features, so head_dim is even",
            f"model.head_dim={model.head_dim + 1}",
        )
    else:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            value = getattr(model.mla, name)
            require(
                value > 0, f"model.mla.{name}", value, "must be above 0 when model.attention=mla", "set it"
            )
        rank = model.mla.q_lora_rank
        require(
            rank >= 0, "model.mla.q_lora_rank", rank, "must not be negative", "0 for queries without a latent"
        )
        rope = model.mla.qk_rope_head_dim
        require(rope % 2 == 0, "model.mla.qk_rope_head_dim", rope, "must be even", f"{rope + 1}")
    _check_rope(model.rope_scaling)


def _check_rope(scaling: RopeScalingConfig) -> None:
    if scaling.kind is RopeScaling.none:
        return
    rules = {
        "factor": (scaling.factor >= 1, "the context grows by a factor of at least 1", "8"),
        "original_context": (scaling.original_context > 0, "must be above 0 positions", "8192"),
        "high_freq_factor": (
            scaling.high_freq_factor > scaling.low_freq_factor > 0,
            f"must be above low_freq_factor = {scaling.low_freq_factor}, and that above 0",
            f"{4 * max(1.0, scaling.low_freq_factor)}",
        ),
        "beta_fast": (
            scaling.beta_fast > scaling.beta_slow > 0,
            f"must be above beta_slow = {scaling.beta_slow}, and that above 0",
            f"{32 * max(1.0, scaling.beta_slow)}",
        ),
    }
    for name, (holds, relation, value) in rules.items():
        field = f"model.rope_scaling.{name}"
        require(holds, field, getattr(scaling, name), relation, f"{field}={value}")


def _check_budget(config: RunConfig) -> None:
    budget = config.parallel.max_tokens_in_flight
    if budget is None:
        return
    field = "parallel.max_tokens_in_flight"
    require(budget > 0, field, budget, "must be above 0, or null for no bound", f"{field}=null")
    require(
        config.layout.num_experts > 0,
        field,
        budget,
        f"layout={config.layout.name} has no experts whose rows it could bound",
        f"{field}=null or a layout with experts (layout=mixtral)",
    )


def _check_engine(config: RunConfig) -> None:
    engine = config.engine
    if engine.sharding is Sharding.auto:
        return
    require(
        engine.name is EngineName.accelerate,
        "engine.sharding",
        engine.sharding.value,
        f"a choice that engine=accelerate has, not engine={engine.name.value}",
        "engine.sharding=auto, or engine=accelerate",
    )
    if engine.sharding is Sharding.fsdp2:
        require(
            config.device is Device.cuda,
            "engine.sharding",
            "fsdp2",
            "on the CPU Accelerate ignores its FSDP plugin without a word and keeps every parameter whole",
            "engine.sharding=ddp, or engine=native, which shards on the CPU too",
        )
        require(
            config.parallel.dp_shard > 1,
            "engine.sharding",
            "fsdp2",
            f"there is nothing to shard over: parallel.dp_shard = {config.parallel.dp_shard}",
            "engine.sharding=ddp",
        )


def _check_compile(config: RunConfig) -> None:
    if not config.train.compile:
        return
    require(
        config.model.target is None,
        "train.compile",
        "true",
        f"it compiles the blocks of Muster's own model, not those of model.target={config.model.target}",
        "train.compile=false, and torch.compile in your model",
    )
    require(
        config.engine.zero_stage != 3,
        "train.compile",
        "true",
        "DeepSpeed's ZeRO-3 gathers weights in hooks of modules, which are compiled away",
        "train.compile=false, engine.zero_stage=2, or engine=native",
    )


def _check_data(config: RunConfig, dims: ParallelDims) -> None:
    data = config.data
    require(
        0.0 < data.valid_fraction < 1.0,
        "data.valid_fraction",
        data.valid_fraction,
        "a share between 0 and 1 of the documents is held out",
        "data.valid_fraction=0.05",
    )
    require(
        data.tokenizer.path is not None or data.tokenizer.vocab_size >= 260,
        "data.tokenizer.vocab_size",
        data.tokenizer.vocab_size,
        "a byte-level BPE holds 256 bytes and its special tokens",
        "data.tokenizer.vocab_size=4096",
    )
    rows = data.target is None and data.source in (Source.jsonl, Source.parquet, Source.hub)
    require(
        data.domain_field is None or rows,
        "data.domain_field",
        data.domain_field,
        "names a field of rows, as data=jsonl, data=parquet and data=hub have them",
        "data.domain_field=null"
        if data.target is None
        else 'data.domain_field=null, and yield {"text": …, "domain": …}',
    )
    if data.target is not None:
        return
    if data.source in (Source.text, Source.jsonl, Source.parquet):
        require(
            data.path is not None,
            "data.path",
            None,
            f"data={data.source.value} reads your files",
            "data.path=FILE, a folder or a quoted glob",
        )
    if data.source is Source.hub:
        require(
            data.name is not None,
            "data.name",
            None,
            "data=hub reads a dataset by name",
            "data.name=OWNER/NAME",
        )
        shards = data.virtual_shards
        legal = [n for n in divisors(config.train.global_batch) if n % dims.dp == 0]
        require(
            bool(legal),
            "train.global_batch",
            config.train.global_batch,
            f"is shared out over data.virtual_shards, and these evenly over dp = {dims.dp} ranks, padding or not",
            f"a multiple of {dims.dp}",
        )
        require(
            shards in legal,
            "data.virtual_shards",
            shards,
            f"must divide train.global_batch = {config.train.global_batch} and be a multiple of dp = {dims.dp}",
            f"data.virtual_shards={nearest(shards, legal)}",
        )


def _check_health(config: RunConfig) -> None:
    health = config.health
    for name in ("collapse", "entropy", "entropy_fall", "drop_rate"):
        value = getattr(health, name)
        default = getattr(HealthConfig, name)
        require(0.0 <= value < 1.0, f"health.{name}", value, "a share in [0, 1)", f"health.{name}={default}")
    limit = health.rank_max_over_mean
    require(
        limit == 0 or limit > 1,
        "health.rank_max_over_mean",
        limit,
        "a multiple of the mean above 1, or 0 for no such alarm",
        "health.rank_max_over_mean=1.75",
    )
    for name, given in (("trace_every", health.trace_every > 0), ("replay", health.replay is not None)):
        require(
            not given or config.layout.num_experts > 0,
            f"health.{name}",
            getattr(health, name),
            f"layout={config.layout.name} routes nothing",
            f"health.{name}={'0' if name == 'trace_every' else 'null'}, or a layout with experts",
        )


def _check_optim(config: RunConfig) -> None:
    optim, steps = config.optim, config.train.steps
    for name in ("beta1", "beta2"):
        value = getattr(optim, name)
        require(0.0 <= value < 1.0, f"optim.{name}", value, "must be in [0, 1)", f"optim.{name}=0.9")
    require(
        0.0 <= optim.min_lr_ratio <= 1.0,
        "optim.min_lr_ratio",
        optim.min_lr_ratio,
        "a share of optim.lr between 0 and 1",
        "optim.min_lr_ratio=0.1",
    )
    if optim.schedule is Schedule.wsd:
        require(
            optim.decay_steps >= 1 and optim.warmup_steps + optim.decay_steps <= steps,
            "optim.decay_steps",
            optim.decay_steps,
            f"wsd decays over at least 1 step, and warmup_steps + decay_steps fit into train.steps = {steps}",
            f"optim.decay_steps={max(1, min(steps - optim.warmup_steps, steps // 5))}",
        )


def _check_dotted(name: str, target: str) -> None:
    module, _, attribute = target.partition(":")
    require(
        bool(module) and bool(attribute),
        name,
        repr(target),
        "names a Python object as package.module:attribute",
        f"{name}=my_package.my_module:MyClass",
    )
