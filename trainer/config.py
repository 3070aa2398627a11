"""The schema of a run, the filling of its blanks and the rules between its fields.

``conf/*.yaml`` gives values, these dataclasses give names, types and neutral defaults. A config goes
through :func:`resolve` (fills every ``-1`` from the machine; pure) and :func:`validate` (checks the
rules that join fields; never writes) before it is frozen into the run directory. Nothing here imports
torch, so that a typo is reported in milliseconds.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from parallel.dims import ParallelDims, divisors, nearest
from parallel.errors import ConfigError

__all__ = ["ConfigError", "Machine", "RunConfig", "parallel_dims", "resolve", "validate"]


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class AttentionKind(Enum):
    gqa = "gqa"
    mla = "mla"


class QkNorm(Enum):
    none = "none"
    head = "head"
    full = "full"


class Activation(Enum):
    swiglu = "swiglu"
    gelu = "gelu"
    relu = "relu"


class Score(Enum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class EngineName(Enum):
    native = "native"


class Schedule(Enum):
    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


class Source(Enum):
    stdlib = "stdlib"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    hub = "hub"


class WandbMode(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


class Terminal(Enum):
    auto = "auto"
    rich = "rich"
    plain = "plain"
    off = "off"


@dataclass
class RunSection:
    root: str = "runs"
    name: str = "default"
    id: str | None = None
    """Chosen once by ``muster train``; under other launchers given or taken from the job id."""
    group: str | None = None
    """W&B group; the points of one sweep share it."""


@dataclass
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434); read when ``model.attention=mla``."""

    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0


@dataclass
class ModelConfig:
    name: str = "custom"
    vocab_size: int = -1
    """-1: the tokenizer's."""
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = -1
    """-1: dim / num_heads."""
    ffn_dim: int = 512
    """Hidden width of a dense feed-forward layer."""
    activation: Activation = Activation.swiglu
    """swiglu has three matrices, gelu and relu two."""
    attention: AttentionKind = AttentionKind.gqa
    qk_norm: QkNorm = QkNorm.none
    mla: MlaConfig = field(default_factory=MlaConfig)
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    init_std: float = 0.02
    target: str | None = None
    """Your own model: ``package.module:callable`` (docs/extending.md)."""
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class BalanceConfig:
    coefficient: float = 0.0
    """Weight of the sequence-wise balance loss."""
    router_z: float = 0.0
    """Weight of the router z-loss."""
    bias_update_rate: float = 0.0
    """Step of the auxiliary-loss-free router bias; 0: no bias."""


@dataclass
class LayoutConfig:
    """Where experts stand in the model and how tokens choose them."""

    name: str = "custom"
    num_experts: int = 0
    """Routed experts in a MoE layer; 0: every layer is dense."""
    top_k: int = 1
    expert_ffn_dim: int = -1
    """Hidden width of one expert; -1: model.ffn_dim / granularity."""
    granularity: int = 1
    num_shared_experts: int = 0
    """Experts that every token passes; built as one feed-forward of their summed width."""
    first_dense_layers: int = 0
    moe_every: int = 1
    """Of the layers after the first dense ones, each n-th is MoE (the last of every n)."""
    score: Score = Score.softmax
    renormalize: bool = True
    """Whether the k chosen scores are divided by their sum."""
    route_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    """Group-limited routing: experts are chosen inside the best top_groups of num_groups."""
    capacity_factor: float | None = None
    """None: dropless. Else each expert takes ceil(factor · seq_len · top_k / num_experts) tokens a row."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    target: str | None = None
    """Your own feed-forward layer: ``package.module:callable`` (docs/extending.md)."""
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class ParallelConfig:
    dp_replicate: int = 1
    dp_shard: int = -1
    """-1: what is left of the world."""
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1


@dataclass
class EngineConfig:
    name: EngineName = EngineName.native
    reshard_after_forward: bool = True
    """Free gathered parameters between forward and backward (ZeRO-3) or keep them (ZeRO-2)."""


@dataclass
class OptimConfig:
    """AdamW (arXiv:1711.05101)."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only; vectors (norms) are not decayed."""
    max_grad_norm: float = 1.0
    """Global norm over all parameters above which gradients are scaled down; 0: never."""
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 0
    decay_steps: int = 0
    """wsd: length of the final linear decay."""
    min_lr_ratio: float = 0.1


@dataclass
class TokenizerConfig:
    path: str | None = None
    """A ``tokenizer.json``; none: a byte-level BPE is trained on the training split."""
    vocab_size: int = 4096


@dataclass
class DataConfig:
    source: Source = Source.stdlib
    path: str | None = None
    """A file, a folder or a glob."""
    name: str | None = None
    """A Hugging Face hub name, or a local folder in the hub's form."""
    subset: str | None = None
    text_field: str = "text"
    valid_fraction: float = 0.05
    """Share of the documents held out: a document's side depends on its own name or content only."""
    respect_documents: bool = True
    """No attention across the documents packed into one row."""
    virtual_shards: int = -1
    """hub: number of independent streams; -1: train.global_batch."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    cache_dir: str = "${oc.env:MUSTER_CACHE,.cache/muster}"
    target: str | None = None
    """Your own documents: ``package.module:callable`` (docs/extending.md)."""
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class TrainConfig:
    steps: int = 100
    global_batch: int = 8
    """Sequences an optimizer step, over all ranks and micro-batches."""
    micro_batch: int = -1
    """Sequences a forward pass on one rank; -1: all of the rank's share."""
    seq_len: int = 256
    seed: int = 0
    dtype: Dtype = Dtype.auto
    """Of activations and matrix products (auto: bf16 on cuda, fp32 on cpu); master weights, router, norms
    and reductions stay fp32."""
    num_threads: int = -1
    """CPU threads a process; -1: the machine's cores / local processes. Part of bit-identity."""
    activation_checkpointing: bool = False


@dataclass
class EvalConfig:
    every: int = 0
    """Steps between evaluations; 0: never."""
    max_rows: int = 64
    """Held-out rows read by an evaluation."""
    sample_tokens: int = 0
    """Tokens generated at the end of training; 0: none."""
    sample_prompt: str = "def "


@dataclass
class CheckpointConfig:
    every: int = 100
    """Steps between checkpoints; 0: at the end only."""
    keep_last: int = 2
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are never removed; 0: none."""
    load_from: str | None = None
    """A run or checkpoint directory to start from when this run has no checkpoint of its own."""
    load_weights_only: bool = False
    """Of load_from: begin at step 0 with a new optimizer and data order instead of going on."""


@dataclass
class ResilienceConfig:
    max_restarts: int = 5
    """Restarts without a new checkpoint in between, after which the run gives up (exit 70)."""
    collective_timeout_seconds: float = 600.0
    stop_grace_seconds: float = 120.0
    """How long workers may take to save after Ctrl-C or SIGTERM."""


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.offline
    project: str = "muster"
    entity: str | None = None


@dataclass
class LoggerConfig:
    every: int = 1
    """Steps between logged steps."""
    terminal: Terminal = Terminal.auto
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class LauncherConfig:
    name: str = "local"
    nnodes: int = 1
    nproc_per_node: int = -1
    """-1: one a GPU, or one where there is none."""


@dataclass
class CallbackConfig:
    target: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunConfig:
    device: Device = Device.auto
    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    callbacks: list[CallbackConfig] = field(default_factory=list)


@dataclass(frozen=True)
class Machine:
    """What :func:`resolve` must know of where the run happens."""

    num_cpus: int
    num_gpus: int = 0

    @classmethod
    def here(cls, num_gpus: int = 0) -> Machine:
        """This host's usable cores; the caller counts GPUs, since that takes torch."""
        return cls(num_cpus=len(os.sched_getaffinity(0)), num_gpus=num_gpus)


def world_size(config: RunConfig) -> int:
    """Ranks of a resolved config."""
    return config.launcher.nnodes * config.launcher.nproc_per_node


def parallel_dims(config: RunConfig) -> ParallelDims:
    """The checked degrees of a resolved config. Raises ConfigError."""
    p = config.parallel
    return ParallelDims.create(
        world_size(config),
        dp_replicate=p.dp_replicate,
        dp_shard=p.dp_shard,
        cp=p.cp,
        tp=p.tp,
        pp=p.pp,
        ep=p.ep,
    )


def resolve(config: RunConfig, machine: Machine) -> RunConfig:
    """A copy with every ``-1`` and ``auto`` replaced by the value they stand for. Pure.

    Raises:
        ConfigError: a blank cannot be filled because the fields it follows from do not fit.
    """
    c = copy.deepcopy(config)
    if c.device is Device.auto:  # one process a GPU: more processes than GPUs is a CPU run
        enough = machine.num_gpus >= max(1, c.launcher.nproc_per_node)
        c.device = Device.cuda if enough else Device.cpu
    if c.train.dtype is Dtype.auto:
        c.train.dtype = Dtype.bf16 if c.device is Device.cuda else Dtype.fp32
    if c.launcher.nproc_per_node == -1:
        c.launcher.nproc_per_node = machine.num_gpus if c.device is Device.cuda else 1
    if c.train.num_threads == -1:
        c.train.num_threads = max(1, machine.num_cpus // max(1, c.launcher.nproc_per_node))
    _require(c.launcher.nnodes >= 1, "launcher.nnodes", c.launcher.nnodes, "there is at least one node", "1")
    _require(
        c.launcher.nproc_per_node >= 1,
        "launcher.nproc_per_node",
        c.launcher.nproc_per_node,
        "a node runs at least one process, or -1 for one a GPU",
        "launcher.nproc_per_node=1",
    )
    dims = parallel_dims(c)
    c.parallel.dp_shard = dims.dp_shard
    if c.train.micro_batch == -1:
        _check_batch(c, dims.dp)
        c.train.micro_batch = c.train.global_batch // dims.dp
    if c.model.head_dim == -1 and c.model.num_heads > 0:
        c.model.head_dim = c.model.dim // c.model.num_heads
    if c.model.vocab_size == -1 and c.data.tokenizer.path is None:
        c.model.vocab_size = c.data.tokenizer.vocab_size
    if c.layout.num_experts and c.layout.expert_ffn_dim == -1 and c.layout.granularity > 0:
        c.layout.expert_ffn_dim = c.model.ffn_dim // c.layout.granularity
    if c.data.virtual_shards == -1:
        c.data.virtual_shards = c.train.global_batch
    return c


def validate(config: RunConfig) -> None:
    """Check every rule that joins fields of a resolved config. Reads only.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    dims = parallel_dims(config)
    _check_ranges(config)
    _check_batch(config, dims.dp)
    _check_model(config.model)
    if config.layout.num_experts:
        _require(
            config.layout.name != "dense",
            "layout.num_experts",
            config.layout.num_experts,
            f"layout=dense has no experts, but model={config.model.name} or an override asks for some",
            "layout=mixtral, or layout.num_experts=0",
        )
        _check_layout(config, dims)
    else:
        _require(
            dims.ep == 1,
            "parallel.ep",
            dims.ep,
            f"layout={config.layout.name} has no experts to spread over ep ranks",
            "parallel.ep=1 or a layout with experts (layout=mixtral)",
        )
    _check_data(config, dims)
    _check_optim(config)
    _require(
        config.checkpoint.keep_last >= 1,
        "checkpoint.keep_last",
        config.checkpoint.keep_last,
        "at least one checkpoint is kept",
        "checkpoint.keep_last=1",
    )
    for index, callback in enumerate(config.callbacks):
        _check_dotted(f"callbacks[{index}].target", callback.target)
    for where in ("model", "layout", "data"):
        target = getattr(config, where).target
        if target is not None:
            _check_dotted(f"{where}.target", target)


def _require(holds: bool, name: str, value: object, relation: str, fix: str) -> None:
    if not holds:
        raise ConfigError(name, value, relation, fix)


_POSITIVE = (
    "model.dim model.num_layers model.num_heads model.num_kv_heads model.ffn_dim model.head_dim "
    "layout.granularity layout.moe_every train.global_batch train.micro_batch train.seq_len "
    "train.num_threads eval.max_rows logger.every data.tokenizer.vocab_size"
).split()
_NOT_NEGATIVE = (
    "layout.num_experts layout.num_shared_experts layout.first_dense_layers layout.balance.coefficient "
    "layout.balance.router_z layout.balance.bias_update_rate optim.lr optim.weight_decay "
    "optim.max_grad_norm optim.warmup_steps optim.decay_steps eval.every eval.sample_tokens "
    "checkpoint.every checkpoint.keep_every resilience.max_restarts train.steps train.seed"
).split()


def _get(config: RunConfig, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        node = getattr(node, part)
    return node


def _check_ranges(config: RunConfig) -> None:
    for path in _POSITIVE:
        value = _get(config, path)
        _require(value > 0, path, value, "must be above 0", f"{path}=1")
    for path in _NOT_NEGATIVE:
        value = _get(config, path)
        _require(value >= 0, path, value, "must not be negative", f"{path}=0")
    for path in ("resilience.collective_timeout_seconds", "resilience.stop_grace_seconds"):
        value = _get(config, path)
        _require(value > 0, path, value, "must be above 0 seconds", f"{path}=60")


def _check_batch(config: RunConfig, dp: int) -> None:
    train = config.train
    micro = max(1, train.micro_batch)
    unit = micro * dp
    if train.global_batch % unit or train.global_batch < unit:
        fitting = max(unit, round(train.global_batch / unit) * unit)
        what = f"dp ({dp})" if train.micro_batch == -1 else f"micro_batch · dp ({micro} · {dp} = {unit})"
        raise ConfigError(
            "train.global_batch",
            train.global_batch,
            f"must be a multiple of {what}, so that every rank gets whole micro-batches",
            f"train.global_batch={fitting}",
        )


def _check_model(model: ModelConfig) -> None:
    _require(
        model.vocab_size == -1 or model.vocab_size > 0,
        "model.vocab_size",
        model.vocab_size,
        "must be above 0, or -1 for the tokenizer's",
        "model.vocab_size=-1",
    )
    if model.target is not None:
        return
    if model.attention is AttentionKind.gqa:
        _require(
            model.num_heads % model.num_kv_heads == 0,
            "model.num_kv_heads",
            model.num_kv_heads,
            f"must divide model.num_heads = {model.num_heads}",
            f"model.num_kv_heads={nearest(model.num_kv_heads, divisors(model.num_heads))}",
        )
        _require(
            model.head_dim % 2 == 0,
            "model.head_dim",
            model.head_dim,
            "rotary embeddings turn pairs of features, so head_dim is even",
            f"model.head_dim={model.head_dim + 1}",
        )
    else:
        for name, value in vars(model.mla).items():
            _require(
                value > 0, f"model.mla.{name}", value, "must be above 0 when model.attention=mla", "set it"
            )
        rope = model.mla.qk_rope_head_dim
        _require(rope % 2 == 0, "model.mla.qk_rope_head_dim", rope, "must be even", f"{rope + 1}")


def _check_layout(config: RunConfig, dims: ParallelDims) -> None:
    layout = config.layout
    num_experts = layout.num_experts
    _require(
        1 <= layout.top_k <= num_experts,
        "layout.top_k",
        layout.top_k,
        f"a token goes to between 1 and layout.num_experts = {num_experts} experts",
        f"layout.top_k={min(max(1, layout.top_k), num_experts)}",
    )
    _require(
        num_experts % dims.ep == 0,
        "parallel.ep",
        dims.ep,
        f"must divide layout.num_experts = {num_experts}",
        f"parallel.ep={nearest(dims.ep, dims.legal_ep(num_experts))}",
    )
    _require(
        layout.expert_ffn_dim > 0,
        "layout.expert_ffn_dim",
        layout.expert_ffn_dim,
        "must be above 0, or -1 for model.ffn_dim / layout.granularity",
        f"layout.expert_ffn_dim={config.model.ffn_dim}",
    )
    _require(
        layout.num_groups >= 1 and num_experts % layout.num_groups == 0,
        "layout.num_groups",
        layout.num_groups,
        f"must divide layout.num_experts = {num_experts}",
        f"layout.num_groups={nearest(layout.num_groups, divisors(num_experts))}",
    )
    _require(
        1 <= layout.top_groups <= layout.num_groups,
        "layout.top_groups",
        layout.top_groups,
        f"between 1 and layout.num_groups = {layout.num_groups}",
        f"layout.top_groups={min(max(1, layout.top_groups), layout.num_groups)}",
    )
    chosen_from = layout.top_groups * (num_experts // layout.num_groups)
    _require(
        layout.top_k <= chosen_from,
        "layout.top_k",
        layout.top_k,
        f"the top {layout.top_groups} group(s) hold {chosen_from} experts to choose from",
        f"layout.top_k={chosen_from}",
    )
    if layout.capacity_factor is not None:
        _require(
            layout.capacity_factor > 0,
            "layout.capacity_factor",
            layout.capacity_factor,
            "must be above 0, or null for dropless",
            "layout.capacity_factor=1.25",
        )
    _require(
        layout.balance.bias_update_rate == 0 or layout.score is Score.sigmoid,
        "layout.balance.bias_update_rate",
        layout.balance.bias_update_rate,
        "the auxiliary-loss-free bias is added to sigmoid scores (arXiv:2408.15664)",
        "layout.score=sigmoid, or bias_update_rate=0 and balance.coefficient=0.01",
    )
    if layout.target is None:
        # FSDP2 shards an expert along the model dimension and cannot pad there.
        _require(
            config.model.dim % dims.expert_shard == 0 and layout.expert_ffn_dim % dims.expert_shard == 0,
            "parallel.ep",
            dims.ep,
            f"each expert is sharded over dp_shard·cp·tp/ep = {dims.expert_shard} ranks, which must divide "
            f"model.dim = {config.model.dim} and layout.expert_ffn_dim = {layout.expert_ffn_dim}",
            f"parallel.ep={max(dims.legal_ep(num_experts))}",
        )


def _check_data(config: RunConfig, dims: ParallelDims) -> None:
    data = config.data
    _require(
        0.0 < data.valid_fraction < 1.0,
        "data.valid_fraction",
        data.valid_fraction,
        "a share between 0 and 1 of the documents is held out",
        "data.valid_fraction=0.05",
    )
    _require(
        data.tokenizer.path is not None or data.tokenizer.vocab_size >= 260,
        "data.tokenizer.vocab_size",
        data.tokenizer.vocab_size,
        "a byte-level BPE holds 256 bytes and its special tokens",
        "data.tokenizer.vocab_size=4096",
    )
    if data.target is not None:
        return
    if data.source in (Source.text, Source.jsonl, Source.parquet):
        _require(
            data.path is not None,
            "data.path",
            None,
            f"data={data.source.value} reads your files",
            "data.path=FILE, a folder or a quoted glob",
        )
    if data.source is Source.hub:
        _require(
            data.name is not None,
            "data.name",
            None,
            "data=hub reads a dataset by name",
            "data.name=OWNER/NAME",
        )
        shards = data.virtual_shards
        legal = [n for n in divisors(config.train.global_batch) if n % dims.dp == 0]
        _require(
            shards in legal,
            "data.virtual_shards",
            shards,
            f"must divide train.global_batch = {config.train.global_batch} and be a multiple of dp = {dims.dp}",
            f"data.virtual_shards={nearest(shards, legal)}",
        )


def _check_optim(config: RunConfig) -> None:
    optim, steps = config.optim, config.train.steps
    for name in ("beta1", "beta2"):
        value = getattr(optim, name)
        _require(0.0 <= value < 1.0, f"optim.{name}", value, "must be in [0, 1)", f"optim.{name}=0.9")
    _require(
        0.0 <= optim.min_lr_ratio <= 1.0,
        "optim.min_lr_ratio",
        optim.min_lr_ratio,
        "a share of optim.lr between 0 and 1",
        "optim.min_lr_ratio=0.1",
    )
    if optim.schedule is Schedule.wsd:
        _require(
            optim.decay_steps >= 1 and optim.warmup_steps + optim.decay_steps <= steps,
            "optim.decay_steps",
            optim.decay_steps,
            f"wsd decays over at least 1 step, and warmup_steps + decay_steps fit into train.steps = {steps}",
            f"optim.decay_steps={max(1, min(steps - optim.warmup_steps, steps // 5))}",
        )


def _check_dotted(name: str, target: str) -> None:
    module, _, attribute = target.partition(":")
    _require(
        bool(module) and bool(attribute),
        name,
        repr(target),
        "names a Python object as package.module:attribute",
        f"{name}=my_package.my_module:MyClass",
    )
