"""The schema of a run and the filling of its blanks.

``conf/*.yaml`` gives values, these dataclasses give names, types and neutral defaults. A config goes
through :func:`resolve` (fills every ``-1`` from the machine; pure) and :func:`trainer.rules.validate` (checks
the rules that join fields; never writes) before it is frozen into the run directory. Neither imports torch,
so that a typo is reported in milliseconds.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from parallel.dims import ParallelDims, nearest
from parallel.errors import ConfigError
from trainer.config_chaos import ChaosConfig, ClusterConfig
from trainer.config_launcher import LauncherConfig, num_nodes
from trainer.config_moe import CureConfig, HealthConfig, LayoutConfig
from trainer.config_survival import CheckpointConfig, GuardConfig, ResilienceConfig

MAX_PROFILED = 50
"""Steps of one profile."""


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


class RopeScaling(Enum):
    none = "none"
    llama3 = "llama3"
    yarn = "yarn"


class Activation(Enum):
    swiglu = "swiglu"
    gelu = "gelu"
    relu = "relu"


class EngineName(Enum):
    native = "native"
    deepspeed = "deepspeed"
    accelerate = "accelerate"


class Sharding(Enum):
    auto = "auto"
    ddp = "ddp"
    fsdp2 = "fsdp2"


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
    resume: bool = False
    """Go on with the run of this id if it is there already: for schedulers that start a job again."""


@dataclass
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434); read when ``model.attention=mla``."""

    q_lora_rank: int = 0
    """Width of the query latent; 0: queries are projected directly."""
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    norm_eps: float | None = None
    """Of the latents' norms; null: model.norm_eps."""


@dataclass
class RopeScalingConfig:
    """How the rotary embedding was stretched to a longer context than the model was first trained on."""

    kind: RopeScaling = RopeScaling.none
    """llama3: as Llama 3.1; yarn: arXiv:2309.00071."""
    factor: float = 1.0
    """New context / old context."""
    original_context: int = 0
    """Positions of the old context."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_context / this are slowed down by factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_context / this stay."""
    beta_fast: float = 32.0
    """yarn: dims that turn more often than this over the old context stay."""
    beta_slow: float = 1.0
    """yarn: dims that turn less often than this are slowed down by factor."""
    attention_factor: float | None = None
    """yarn: factor on cos and sin; null: 0.1 · ln(factor) + 1, or the quotient of the two below."""
    mscale: float = 0.0
    """yarn: with mscale_all_dim, cos and sin get (0.1 · mscale · ln(factor) + 1) / (the same of the other)."""
    mscale_all_dim: float = 0.0
    """Latent attention: the logits get (0.1 · this · ln(factor) + 1)²; 0: nothing."""


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
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    norm_eps: float = 1e-5
    tied_embeddings: bool = False
    init_std: float = 0.02
    target: str | None = None
    """Your own model: ``package.module:callable`` (docs/extending.md)."""
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
    max_tokens_in_flight: int | None = None
    """Rows (one for each token and expert it goes to) that a rank's experts receive at a time; more come in rounds,
    recomputed in backward: a hot expert costs time, not memory. null: no bound (docs/memory.md)."""


@dataclass
class EngineConfig:
    name: EngineName = EngineName.native
    reshard_after_forward: bool = True
    """Free gathered parameters between forward and backward (ZeRO-3) or keep them (ZeRO-2)."""
    zero_stage: int | None = None
    """deepspeed: 0 shards nothing, 1 the optimizer, 2 gradients as well, 3 weights as well."""
    ds_config: str | None = None
    """deepspeed: a JSON file in DeepSpeed's own form; what it says twice must agree (docs/engines.md)."""
    sharding: Sharding = Sharding.auto
    """accelerate: what it makes of the dense parameters; ddp: whole on every rank; fsdp2 (CUDA): sharded over
    dp_shard; auto: fsdp2 where there is CUDA and dp_shard is above 1, else ddp."""


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
    domain_field: str | None = None
    """Field of a row (jsonl, parquet, hub) that says what kind of text it is, `meta.source` inside an object:
    the report then shows which experts it goes to. null: the first folder under data.path."""
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
    pad_batch: bool = False
    """Where global_batch is not whole micro-batches on every rank, fill up with rows without targets, which change
    no sum. Off, it is an error."""
    seq_len: int = 256
    seed: int = 0
    dtype: Dtype = Dtype.auto
    """Of activations and matrix products (auto: bf16 on cuda, fp32 on cpu); master weights, router, norms
    and reductions stay fp32."""
    num_threads: int = -1
    """CPU threads a process; -1: the machine's cores / local processes. Part of bit-identity."""
    activation_checkpointing: bool = False
    compile: bool = False
    """Compile attention, norms and residuals of the blocks (torch.compile): other bits, and the first step waits
    for it. Experts and what is exchanged stay as they are."""
    profile: str | None = None
    """Steps to profile, "10-12" or "10": a trace, and what each part of a step took, of every rank that exchanges
    tokens with rank 0 (docs/using.md). null: none."""
    verify_first: bool = False
    """Prove the layout (`muster verify`) before training; a certificate that fails ends the command."""


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
class WandbConfig:
    mode: WandbMode = WandbMode.offline
    project: str = "muster"
    entity: str | None = None


@dataclass
class LoggerConfig:
    every: int = 1
    """Steps between logged steps."""
    terminal: Terminal = Terminal.auto
    report: bool = True
    """Write report.html at the end (2 s of a processor); without, `muster report RUN_DIR` writes it when asked."""
    wandb: WandbConfig = field(default_factory=WandbConfig)


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
    guard: GuardConfig = field(default_factory=GuardConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    cure: CureConfig = field(default_factory=CureConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    chaos: ChaosConfig = field(default_factory=ChaosConfig)
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
    return num_nodes(config.launcher) * config.launcher.nproc_per_node


def profiled_steps(config: RunConfig) -> tuple[int, int] | None:
    """First and last step of ``train.profile``; None: no step is profiled. Raises ConfigError."""
    text = config.train.profile
    if text is None:
        return None
    first, dash, last = text.partition("-")
    last = last if dash else first
    numbers = first.isdecimal() and last.isdecimal()
    require(
        numbers and 1 <= int(first) <= int(last) <= config.train.steps,
        "train.profile",
        text,
        f"it is a step, or FIRST-LAST, of those that the run makes (1 to {config.train.steps})",
        f"train.profile={max(1, config.train.steps - 2)}-{config.train.steps}",
    )
    require(
        int(last) - int(first) < MAX_PROFILED,
        "train.profile",
        text,
        f"a trace of more than {MAX_PROFILED} steps is larger than its viewers take",
        f"train.profile={first}-{int(first) + 2}",
    )
    return int(first), int(last)


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
    num_nodes(c.launcher)  # before the degrees, which a wrong number would make look wrong
    require(
        c.launcher.nproc_per_node >= 1,
        "launcher.nproc_per_node",
        c.launcher.nproc_per_node,
        "a node runs at least one process, or -1 for one a GPU",
        "launcher.nproc_per_node=1",
    )
    dims = parallel_dims(c)
    c.parallel.dp_shard = dims.dp_shard
    check_ep(c, dims)  # before the batch, which an ep that cannot be would make look wrong
    if c.train.micro_batch == -1:
        check_batch(c, dims.dp)
        c.train.micro_batch = -(-c.train.global_batch // dims.dp)
    if c.model.head_dim == -1 and c.model.num_heads > 0:
        c.model.head_dim = c.model.dim // c.model.num_heads
    if c.model.vocab_size == -1 and c.data.tokenizer.path is None:
        c.model.vocab_size = c.data.tokenizer.vocab_size
    if c.layout.num_experts and c.layout.expert_ffn_dim == -1 and c.layout.granularity > 0:
        c.layout.expert_ffn_dim = c.model.ffn_dim // c.layout.granularity
    for size in c.layout.expert_sizes:
        if size.ffn_dim == -1 and size.granularity > 0:
            size.ffn_dim = c.model.ffn_dim // size.granularity
    if c.data.virtual_shards == -1:
        c.data.virtual_shards = c.train.global_batch
    return c


def require(holds: bool, name: str, value: object, relation: str, fix: str) -> None:
    """Raise ConfigError(name, value, relation, fix) unless the rule holds."""
    if not holds:
        raise ConfigError(name, value, relation, fix)


def check_batch(config: RunConfig, dp: int) -> None:
    """Raise ConfigError unless the global batch is whole micro-batches on every rank."""
    train = config.train
    if train.pad_batch and train.global_batch > 0:
        return
    micro = max(1, train.micro_batch)
    unit = micro * dp
    if train.global_batch % unit or train.global_batch < unit:
        fitting = max(unit, round(train.global_batch / unit) * unit)
        what = f"dp ({dp})" if train.micro_batch == -1 else f"micro_batch · dp ({micro} · {dp} = {unit})"
        raise ConfigError(
            "train.global_batch",
            train.global_batch,
            f"must be a multiple of {what}, so that every rank gets whole micro-batches",
            f"train.global_batch={fitting}, or train.pad_batch=true",
        )


def check_ep(config: RunConfig, dims: ParallelDims) -> None:
    """Raise ConfigError unless the experts (of each size) are dealt evenly to the ep ranks."""
    layout = config.layout
    together = math.gcd(layout.num_experts, *(size.num for size in layout.expert_sizes))
    each = f"layout.num_experts = {layout.num_experts}"
    if layout.expert_sizes:
        each = f"each num of layout.expert_sizes ({', '.join(str(size.num) for size in layout.expert_sizes)})"
    require(
        together % dims.ep == 0,
        "parallel.ep",
        dims.ep,
        f"must divide {each}",
        f"parallel.ep={nearest(dims.ep, dims.legal_ep(together))}",
    )
