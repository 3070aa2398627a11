"""The rules of ``launcher=slurm`` and ``launcher=kubernetes``. Reads only; torch-free."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.config import Device, Machine, RunConfig, require
from trainer.config_launcher import (
    KubernetesConfig,
    KubernetesKind,
    LauncherConfig,
    SlurmConfig,
    node_range,
)
from trainer.terms import open_terms

SUBMITTED = ("slurm", "kubernetes")
"""Launchers whose jobs ``muster submit`` writes."""
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d{1,4})(?::(?P<minutes>\d{2}))?(?::(?P<seconds>\d{2}))?")
_SLURM_MEMORY = re.compile(r"\d+[KMGT]?")
_QUANTITY = re.compile(r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MINE_SBATCH = {
    "--nodes": "launcher.nnodes",
    "-N": "launcher.nnodes",
    "--ntasks": "launcher.nnodes: one agent a node",
    "-n": "launcher.nnodes: one agent a node",
    "--ntasks-per-node": "launcher.nproc_per_node: the agent starts the processes",
    "--cpus-per-task": "launcher.slurm.cpus_per_node",
    "-c": "launcher.slurm.cpus_per_node",
    "--gpus-per-node": "launcher.slurm.gpus_per_node",
    "--time": "launcher.slurm.time",
    "-t": "launcher.slurm.time",
    "--signal": "launcher.slurm.signal_seconds",
    "--requeue": "launcher.slurm.requeue",
    "--no-requeue": "launcher.slurm.requeue",
    "--output": "run.root: logs are in the run directory",
    "-o": "run.root: logs are in the run directory",
}
_MINE_POD = {
    "containers": "launcher.kubernetes.image",
    "initContainers": "launcher.kubernetes.image",
    "volumes": "launcher.kubernetes.claim",
    "subdomain": "launcher.name: the nodes find each other by it",
    "restartPolicy": "launcher.kubernetes.max_restarts",
    "terminationGracePeriodSeconds": "resilience.stop_grace_seconds",
}
_PATCHABLE = (
    "affinity imagePullSecrets nodeSelector schedulingGates securityContext serviceAccountName tolerations"
).split()
"""What Kubeflow Trainer 2.3 lets a TrainJob say of its pods beyond what Muster says."""


def node_of(launcher: LauncherConfig) -> Machine:
    """What a compute node has, as far as the job asks for it: never the machine where it is submitted.

    Raises:
        ConfigError: the cores are not given.
    """
    asked: SlurmConfig | KubernetesConfig = (
        launcher.slurm if launcher.name == "slurm" else launcher.kubernetes
    )
    where = f"launcher.{launcher.name}"
    require(
        asked.cpus_per_node is not None and asked.cpus_per_node > 0,
        f"{where}.cpus_per_node",
        asked.cpus_per_node,
        "says how many cores of each compute node the job takes; this machine's are no guide",
        f"{where}.cpus_per_node=8",
    )
    require(
        asked.gpus_per_node >= 0,
        f"{where}.gpus_per_node",
        asked.gpus_per_node,
        "must not be negative",
        f"{where}.gpus_per_node=0",
    )
    assert asked.cpus_per_node is not None
    return Machine(num_cpus=asked.cpus_per_node, num_gpus=asked.gpus_per_node)


def check_launcher(config: RunConfig) -> None:
    """Check how many nodes there are, and what a submitted job asks for.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    launcher = config.launcher
    _check_nodes(launcher)
    if launcher.name not in SUBMITTED:
        return
    node = node_of(launcher)
    processes = launcher.nproc_per_node
    require(
        config.device is not Device.cuda or processes <= node.num_gpus,
        f"launcher.{launcher.name}.gpus_per_node",
        node.num_gpus,
        f"device=cuda takes a GPU for each of launcher.nproc_per_node={processes} processes",
        f"launcher.{launcher.name}.gpus_per_node={processes}, or device=cpu",
    )
    if launcher.name == "slurm":
        _check_slurm(launcher.slurm, config.resilience.stop_grace_seconds)
    else:
        _check_kubernetes(launcher.kubernetes, config.run.root)


def _check_nodes(launcher: LauncherConfig) -> None:
    nodes = node_range(launcher)
    require(
        launcher.num_nodes == -1 or nodes.least <= launcher.num_nodes <= nodes.most,
        "launcher.num_nodes",
        launcher.num_nodes,
        f"the layout is for -1 (all) or between {nodes.least} and {nodes.most} nodes (launcher.nnodes)",
        "launcher.num_nodes=-1",
    )
    if launcher.rendezvous is not None:
        open_terms(launcher.rendezvous, Path())
    for name in ("spares", "rejoin_seconds"):
        value = getattr(launcher, name)
        require(value >= 0, f"launcher.{name}", value, "must not be negative", f"launcher.{name}=0")


def time_limit_seconds(text: str) -> int | None:
    """Seconds of Slurm's ``HH:MM:SS``, ``D-HH``, ``D-HH:MM`` or ``D-HH:MM:SS``; None for any other form.

    Slurm also reads bare minutes and ``MM:SS``; they are refused because they are so easily taken for something
    else, and because YAML turns an unquoted 12:00:00 into the number 43200.
    """
    match = _TIME.fullmatch(text)
    if match is None or (match["days"] is None and match["seconds"] is None):
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_slurm(slurm: SlurmConfig, grace: float) -> None:
    limit = None
    if slurm.time is not None:
        limit = time_limit_seconds(slurm.time)
        require(
            limit is not None,
            "launcher.slurm.time",
            slurm.time,
            "is HH:MM:SS or D-HH:MM:SS, in YAML in quotes",
            "launcher.slurm.time=12:00:00",
        )
    require(
        slurm.signal_seconds >= grace,
        "launcher.slurm.signal_seconds",
        slurm.signal_seconds,
        f"must leave time to save: resilience.stop_grace_seconds={grace:g}",
        f"launcher.slurm.signal_seconds={int(grace) + 60}",
    )
    require(
        limit is None or slurm.signal_seconds < limit,
        "launcher.slurm.signal_seconds",
        slurm.signal_seconds,
        f"comes before the job has begun: the time limit is {limit} s",
        "a longer launcher.slurm.time",
    )
    _check_slurm_words(slurm)


def _check_slurm_words(slurm: SlurmConfig) -> None:
    require(
        slurm.mem is None or _SLURM_MEMORY.fullmatch(slurm.mem) is not None,
        "launcher.slurm.mem",
        slurm.mem,
        "is a number with K, M, G or T, or 0 for all of a node's memory",
        "launcher.slurm.mem=64G",
    )
    require(
        slurm.gpu_type is None or slurm.gpus_per_node > 0,
        "launcher.slurm.gpu_type",
        slurm.gpu_type,
        "launcher.slurm.gpus_per_node asks for no GPUs",
        "launcher.slurm.gpus_per_node=8",
    )
    for name in ("partition", "account", "qos", "constraint", "gpu_type"):
        value = getattr(slurm, name)
        require(
            value is None or (bool(value.strip()) and "\n" not in value),
            f"launcher.slurm.{name}",
            repr(value),
            "is one line of text",
            f"launcher.slurm.{name}=null",
        )
    for name in ("sbatch_args", "srun_args"):
        for option in getattr(slurm, name):
            require(
                option.startswith("-") and "\n" not in option,
                f"launcher.slurm.{name}",
                option,
                "each entry is one option, with its value after =",
                f"launcher.slurm.{name}=['--exclusive']",
            )
            flag = option.partition("=")[0].split()[0]
            require(
                flag not in _MINE_SBATCH,
                f"launcher.slurm.{name}",
                option,
                f"{flag} follows from {_MINE_SBATCH.get(flag, '')}",
                "leave it out",
            )


def _check_kubernetes(kubernetes: KubernetesConfig, root: str) -> None:
    where = "launcher.kubernetes"
    for name, fix in (("image", "registry.example.com/muster:1.0"), ("claim", "training")):
        value = getattr(kubernetes, name)
        require(bool(value), f"{where}.{name}", value, "must be given", f"{where}.{name}={fix}")
    require(
        root.startswith("/"),
        "run.root",
        root,
        f"{where}.claim is mounted there in every pod, so it is an absolute path",
        "run.root=/runs",
    )
    for name in ("mem", "shm"):
        value = getattr(kubernetes, name)
        require(
            value is None or _QUANTITY.fullmatch(value) is not None,
            f"{where}.{name}",
            value,
            "is an amount of memory as Kubernetes writes it",
            f"{where}.{name}=64Gi",
        )
    require(
        kubernetes.max_restarts >= 0,
        f"{where}.max_restarts",
        kubernetes.max_restarts,
        "must not be negative",
        f"{where}.max_restarts=0",
    )
    _check_pods(kubernetes)


def _check_pods(kubernetes: KubernetesConfig) -> None:
    where = "launcher.kubernetes"
    for name, value in kubernetes.env.items():
        require(
            _VARIABLE.fullmatch(name) is not None and value is not None and not isinstance(value, list),
            f"{where}.env.{name}",
            value,
            "is a variable's name with text, or with a source like {secretKeyRef: {name: …, key: …}}",
            f"{where}.env.NCCL_DEBUG=INFO",
        )
        require(
            not name.startswith("PET_"),
            f"{where}.env.{name}",
            value,
            "is set by Kubeflow's torch runtime",
            "leave it out",
        )
    patchable = kubernetes.kind is KubernetesKind.trainjob
    for name in kubernetes.pod_spec:
        require(
            name not in _MINE_POD,
            f"{where}.pod_spec.{name}",
            "…",
            f"follows from {_MINE_POD.get(name, '')}",
            "leave it out",
        )
        require(
            not patchable or name in _PATCHABLE,
            f"{where}.pod_spec.{name}",
            "…",
            f"a TrainJob may only set {', '.join(_PATCHABLE)}",
            f"put it into the runtime {kubernetes.runtime}, or {where}.kind=job",
        )
