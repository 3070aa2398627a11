"""What a config may say of where a run happens: this machine, hosts, Slurm, Kubernetes. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


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
