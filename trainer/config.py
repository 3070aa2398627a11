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


class Score(Enum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class RouterName(Enum):
    top_k = "top_k"
    hierarchical = "hierarchical"
    sinkhorn = "sinkhorn"
    expert_choice = "expert_choice"
    hash = "hash"


class DropBy(Enum):
    position = "position"
    score = "score"


class BalanceScope(Enum):
    sequence = "sequence"
    step = "step"
    micro = "micro"


class BiasUpdate(Enum):
    sign = "sign"
    proportional = "proportional"


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
class BalanceConfig:
    coefficient: float = 0.0
    """Weight of the balance loss."""
    scope: BalanceScope = BalanceScope.sequence
    """Over what the load of an expert is counted. sequence: each row; step: the whole step before; micro: the
    rows of one forward pass on one rank, which changes with the layout (`muster verify` refuses it)."""
    router_z: float = 0.0
    """Weight of the router z-loss."""
    bias_update_rate: float = 0.0
    """Step of the auxiliary-loss-free router bias; 0: no bias."""
    bias_update: BiasUpdate = BiasUpdate.sign
    """sign: each expert's bias moves by the rate; proportional: by the rate times its load / mean - 1."""


@dataclass
class ExpertSize:
    """Experts of one width, where a layer has experts of several (``layout.expert_sizes``)."""

    num: int = 0
    ffn_dim: int = -1
    granularity: int = 1


@dataclass
class LayoutConfig:
    """Where experts stand in the model and how tokens choose them."""

    name: str = "custom"
    num_experts: int = 0
    """Routed experts in a MoE layer; 0: every layer is dense."""
    top_k: int = 1
    """Experts a token goes to; with router=expert_choice on average."""
    expert_ffn_dim: int = -1
    """Hidden width of one expert; -1: model.ffn_dim / granularity."""
    granularity: int = 1
    expert_sizes: list[ExpertSize] = field(default_factory=list)
    """Experts of several widths: `[{num: 8, granularity: 2}, {num: 4, ffn_dim: 512}]`, which add up to
    num_experts. Empty: all have expert_ffn_dim."""
    num_zero_experts: int = 0
    """Further experts that answer nothing: a token that chooses one skips that share of the work."""
    num_copy_experts: int = 0
    """Further experts that answer the token itself."""
    num_shared_experts: int = 0
    """Experts that every token passes; built as one feed-forward of their summed width."""
    shared_gate: bool = False
    """Whether the shared experts' answer is multiplied by a learnt gate in (0, 1)."""
    first_dense_layers: int = 0
    moe_every: int = 1
    """Of the layers after the first dense ones, each n-th is MoE (the last of every n)."""
    router: RouterName = RouterName.top_k
    """top_k: the best scores; hierarchical: the best groups, then the best in each; sinkhorn: the best after the
    scores of a row were balanced; expert_choice: each expert picks its tokens; hash: by the token's id."""
    score: Score = Score.softmax
    logit_norm: float = 0.0
    """Standard deviation that a token's router logits are normalised to; 0: they are left as they are."""
    jitter: float = 0.0
    """In training the router's input is multiplied by noise in [1 - jitter, 1 + jitter]."""
    sample_second: bool = False
    """With top_k=2, in training the second expert is used with probability min(1, 2 · its weight)."""
    renormalize: bool = True
    """Whether the k chosen scores are divided by their sum."""
    route_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    """Group-limited routing: experts are chosen inside the best top_groups of num_groups."""
    capacity_factor: float | None = None
    """None: dropless. Else each expert takes ceil(factor · seq_len · top_k / num_experts) tokens a row."""
    drop_by: DropBy = DropBy.position
    """Who gets the places: first choices before second ones and earlier positions first, or the best scores."""
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
    seq_len: int = 256
    seed: int = 0
    dtype: Dtype = Dtype.auto
    """Of activations and matrix products (auto: bf16 on cuda, fp32 on cpu); master weights, router, norms
    and reductions stay fp32."""
    num_threads: int = -1
    """CPU threads a process; -1: the machine's cores / local processes. Part of bit-identity."""
    activation_checkpointing: bool = False
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
    check_exchanges: bool = False
    """Before each exchange of tokens, agree on it out of band: ranks that diverge are then named, at some cost."""
    node_timeout_seconds: float = 30.0
    """How long a node may be silent before it counts as lost."""


@dataclass
class HealthConfig:
    """What is watched of the routing, and from where on it is trouble (docs/health.md)."""

    every: int = 10
    """Steps between looks at the window, when alarms may come; 0: the routing is not watched."""
    window: int = 20
    """Steps that the window looks back: an exponential mean whose weights fall to 1/e over them."""
    maps_every: int = 100
    """Steps between counts of which experts are chosen together; evaluations count besides. 0: these only."""
    collapse: float = 0.25
    """Alarm where the load is spread less evenly than this: 1 evenly, 0 when the same top_k experts take every
    token. 0: no such alarm."""
    dead_steps: int = 50
    """Alarm where an expert had no token for so many steps; 0: no such alarm."""
    entropy: float = 0.03
    """Alarm where the router's entropy is below this share of an even router's; 0: no such alarm."""
    entropy_fall: float = 0.5
    """Alarm where the entropy over the window is below this share of that over eight windows; 0: no such alarm."""
    rank_max_over_mean: float = 1.75
    """Alarm where the busiest ep rank is sent so many times the mean (dropless layouts); 0: no such alarm."""
    drop_rate: float = 0.4
    """Alarm where this share of the routed pairs is dropped; 0: no such alarm."""
    trace_every: int = 0
    """Steps between recordings of every token's choices into traces/, those of evaluations besides; 0: none."""
    replay: str | None = None
    """A run directory whose traces the routers follow instead of choosing."""


@dataclass
class RaiseBalanceConfig:
    """Multiply a layer's balance coefficient while the layer stays uneven (docs/cure.md)."""

    enabled: bool = False
    """Whether a layer that stays uneven gets a larger balance coefficient."""
    threshold: float = 2.0
    """Uneven: the busiest expert's load / the mean is above this."""
    even: float = 1.25
    """Even again: it is below this; the coefficient then goes down again, by the same steps."""
    patience: int = 50
    """Steps that are looked at, and that pass before a layer's coefficient is changed again."""
    factor: float = 2.0
    """By which the coefficient is multiplied, and divided on the way back."""
    limit: float = 16.0
    """Never above this many times layout.balance.coefficient."""


@dataclass
class AdaptBalanceConfig:
    """A balance coefficient a layer that follows what the layer drops (Skywork-MoE, arXiv:2406.06563, 4.2)."""

    enabled: bool = False
    """Whether each layer's balance coefficient follows its drop rate, instead of layout.balance.coefficient."""
    sensitivity: float = 0.2
    """Coefficient / drop rate; without a capacity the rate that a capacity of the mean load would drop."""
    maximum: float = 0.01
    """Of the coefficient."""
    decay: float = 0.99
    """Of the moving average that the coefficient is."""


@dataclass
class ReviveDeadConfig:
    """Let dead experts take over half of busy ones, optimizer state included (docs/cure.md)."""

    enabled: bool = False
    """Whether dead experts are made from busy ones."""
    threshold: float = 0.01
    """Dead: a load / mean at or below this over the last `patience` steps, or no token at all in as many."""
    patience: int = 100
    """Steps before an expert counts as dead, and that a layer is left alone after it was operated on."""
    max_at_once: int = 4
    """Experts of the whole model that are revived after one step; the worst layers come first."""
    noise: float = 0.01
    """Relative standard deviation of the noise on the copy's weights."""
    split: float = 0.1
    """Relative standard deviation of what tells the two rows of the router apart."""


@dataclass
class ResetBiasConfig:
    """Set the router's bias of auxiliary-loss-free balancing back to 0 where it has run away (docs/cure.md)."""

    enabled: bool = False
    """Whether a bias that has run away is set back to 0."""
    threshold: float = 2.0
    """Uneven: the busiest expert's load / the mean is above this over the last `patience` steps."""
    spread: float = 1.0
    """Run away: the largest bias - the smallest one is at least this; scores are between 0 and 1."""
    patience: int = 100
    """Steps that are looked at, and that a layer is left alone after a reset."""


@dataclass
class CureConfig:
    """What is done about experts that are used too much or not at all (docs/cure.md)."""

    every: int = 1
    """Steps between looks at the loads; each is a copy of them to the host."""
    raise_balance: RaiseBalanceConfig = field(default_factory=RaiseBalanceConfig)
    adapt_balance: AdaptBalanceConfig = field(default_factory=AdaptBalanceConfig)
    revive_dead: ReviveDeadConfig = field(default_factory=ReviveDeadConfig)
    reset_bias: ResetBiasConfig = field(default_factory=ResetBiasConfig)


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
class SlurmConfig:
    """What ``muster submit launcher=slurm`` asks Slurm for (docs/launching.md)."""

    cpus_per_node: int | None = None
    """Cores a node; must be given."""
    gpus_per_node: int = 0
    """GPUs a node."""
    gpu_type: str | None = None
    """As the cluster names it: h100."""
    mem: str | None = None
    """Memory a node, as in 480G; 0: all of it; null: the partition's default."""
    time: str | None = None
    """Time limit, HH:MM:SS or D-HH:MM:SS (in YAML in quotes); null: the partition's."""
    partition: str | None = None
    """--partition; null: the cluster's default."""
    account: str | None = None
    """--account."""
    qos: str | None = None
    """--qos."""
    constraint: str | None = None
    """--constraint: features that the nodes must have."""
    requeue: bool = True
    """Whether the job is queued again when a node fails, and when it was saved ahead of its time limit."""
    signal_seconds: int = 180
    """How long before the time limit the run is asked to save; at least resilience.stop_grace_seconds."""
    sbatch_args: list[str] = field(default_factory=list)
    """More options of sbatch, as in ['--exclusive', '--mail-type=END']."""
    srun_args: list[str] = field(default_factory=list)
    """More options of srun, as in ['--container-image=IMAGE']."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the start, as in ['module load cuda', 'source venv/bin/activate']."""


class KubernetesKind(Enum):
    job = "job"
    trainjob = "trainjob"


@dataclass
class KubernetesConfig:
    """What ``muster submit launcher=kubernetes`` writes (docs/launching.md)."""

    kind: KubernetesKind = KubernetesKind.job
    """job: an Indexed Job and its Service; trainjob: a TrainJob of Kubeflow Trainer."""
    image: str | None = None
    """Image with Muster and its conf/ in it; must be given."""
    claim: str | None = None
    """PersistentVolumeClaim that all pods can write, mounted at run.root; must be given."""
    namespace: str | None = None
    """null: the one that kubectl is set to."""
    cpus_per_node: int | None = None
    """Cores a pod; must be given."""
    gpus_per_node: int = 0
    """GPUs a pod (nvidia.com/gpu)."""
    mem: str | None = None
    """Memory a pod, as in 480Gi; null: no request and no limit."""
    shm: str = "8Gi"
    """Size of /dev/shm; it counts as the pod's memory."""
    max_restarts: int = 3
    """job: how often each pod may fail on average before the job has failed; pods that saved do not count."""
    runtime: str = "torch-distributed"
    """trainjob: the ClusterTrainingRuntime."""
    env: dict[str, Any] = field(default_factory=dict)
    """Variables of the container: text, or a source as in {secretKeyRef: {name: wandb, key: api-key}}."""
    labels: dict[str, str] = field(default_factory=dict)
    """Of the job, as in kueue.x-k8s.io/queue-name."""
    pod_spec: dict[str, Any] = field(default_factory=dict)
    """More of the pods' spec in Kubernetes' own form: nodeSelector, tolerations, imagePullSecrets, …"""


@dataclass
class LauncherConfig:
    name: str = "local"
    nnodes: int = 1
    """Under torchrun and the like, as many as it was launched on. launcher=ssh: -1 for every host of the file."""
    nproc_per_node: int = -1
    """-1: one a GPU, or one where there is none."""
    node_rank: int | None = None
    """Which of nnodes this one is. null: 0 where master_addr is an address of this machine, else in order of
    arrival."""
    master_addr: str | None = None
    """Host of node 0, the same on every node; its agent listens at master_port."""
    master_port: int = 29400
    """A TCP port of node 0 that the other nodes can reach."""
    join_timeout_seconds: float = 300.0
    """How long nodes wait for one another, at the start and for one that was lost."""
    hostfile: str | None = None
    """launcher=ssh: a line a node, `HOST [slots=PROCESSES]`."""
    ssh_args: list[str] = field(default_factory=list)
    """launcher=ssh: arguments for ssh, as in ['-p', '2222']."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)


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
    health: HealthConfig = field(default_factory=HealthConfig)
    cure: CureConfig = field(default_factory=CureConfig)
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
    require(
        c.launcher.nnodes >= 1,
        "launcher.nnodes",
        c.launcher.nnodes,
        "there is at least one node (-1, every host of a hostfile, is for `muster train launcher=ssh`)",
        "launcher.nnodes=1",
    )
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
        c.train.micro_batch = c.train.global_batch // dims.dp
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
