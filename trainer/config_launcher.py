"""What a config may say of where a run happens: this machine, hosts, Slurm, Kubernetes. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from parallel.errors import ConfigError

_RANGE = re.compile(r"((?P<least>\d+):)?(?P<most>\d+)")


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
    nnodes: int | str = 1
    """How many nodes; MIN:MAX (in YAML in quotes) goes on with fewer when some are lost. Under torchrun and the
    like, as many as it was launched on. launcher=ssh: -1 for every host of the file."""
    num_nodes: int = -1
    """How many nodes the layout is for; -1: MAX of nnodes. Set by Muster in the configs of a run that lost some."""
    spares: int = 0
    """Nodes beyond nnodes that wait to take the place of a lost one."""
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
    rejoin_seconds: float = 60.0
    """nnodes=MIN:MAX: how long a lost node is waited for before the others go on without it."""
    rendezvous: str | None = None
    """Where it is written who leads the nodes, so that another takes over when node 0 is lost: etcd://HOST:PORT;
    null: the run directory."""
    hostfile: str | None = None
    """launcher=ssh: a line a node, `HOST [slots=PROCESSES]`."""
    ssh_args: list[str] = field(default_factory=list)
    """launcher=ssh: arguments for ssh, as in ['-p', '2222']."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)


class NodeRange(NamedTuple):
    """How few and how many nodes a run may have."""

    least: int
    most: int


def node_range(launcher: LauncherConfig) -> NodeRange:
    """``launcher.nnodes`` as numbers: N is N to N, MIN:MAX what it says.

    Raises:
        ConfigError: it is neither, or asks for no node.
    """
    parts = _RANGE.fullmatch(str(launcher.nnodes))
    if parts is not None:
        most = int(parts["most"])
        found = NodeRange(most if parts["least"] is None else int(parts["least"]), most)
        if 1 <= found.least <= found.most:
            return found
    raise ConfigError(
        "launcher.nnodes",
        launcher.nnodes,
        "is a number of nodes, at least 1, or MIN:MAX (-1, every host of a hostfile, is for `muster train "
        "launcher=ssh`)",
        "launcher.nnodes=1",
    )


def num_nodes(launcher: LauncherConfig) -> int:
    """Nodes of the layout. Raises ConfigError."""
    return node_range(launcher).most if launcher.num_nodes == -1 else launcher.num_nodes


def num_hosts(launcher: LauncherConfig) -> int:
    """Machines that the run takes at the most, spares included. Raises ConfigError."""
    return node_range(launcher).most + launcher.spares
