"""The manifest of a run on Kubernetes: an Indexed Job with its headless Service, or Kubeflow's TrainJob.

One pod a node, one agent a pod. All pods share one volume at ``run.root``. They run ``muster train`` with the
submitted overrides and ``run.resume=true``, so a pod that starts again goes on with the run.

=========  ==========================================  ====================================================
           Indexed Job                                 TrainJob
=========  ==========================================  ====================================================
node rank  JOB_COMPLETION_INDEX                        PET_NODE_RANK (the torch runtime sets it)
node 0     NAME-0.NAME, by the Service                 PET_MASTER_ADDR, PET_MASTER_PORT
restarts   podFailurePolicy: 2 fails the job, 75 and   those of the runtime that the administrator wrote
           disruptions do not count
=========  ==========================================  ====================================================
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from launch.outcome import EXIT_CONFIG, EXIT_STOPPED, Outcome
from parallel.errors import ConfigError
from trainer import overrides as grammar
from trainer.compose import write_atomically
from trainer.config import RunConfig
from trainer.config_launcher import KubernetesConfig, KubernetesKind, num_hosts

CONTAINER = "muster"
_RUNTIME_PART = "node"
"""The runtime's job and container that train; Kubeflow fixes both names."""
_MAX_NAME = 48
"""A host name has 63 characters, and takes the pod's index and Kubeflow's own parts besides."""
_LEAVE_SECONDS = 30
_GPU = "nvidia.com/gpu"


def object_name(config: RunConfig) -> str:
    """The name of the Kubernetes objects of a run.

    Raises:
        ConfigError: it is too long.
    """
    text = f"{config.run.name}-{config.run.id}".lower()
    name = re.sub(r"[^a-z0-9]+", "-", text).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}"
    if len(name) > _MAX_NAME:
        raise ConfigError(
            "run.name",
            config.run.name,
            f"makes the Kubernetes name {name} of {len(name)} characters; {_MAX_NAME} fit",
            "a shorter run.name or run.id",
        )
    return name


def manifest(config: RunConfig, overrides: list[str]) -> str:
    """The YAML to apply.

    Args:
        config: resolved and validated, ``launcher=kubernetes``, with an id.
        overrides: as submitted; the pods compose them with the image's conf/.
    """
    if config.launcher.kubernetes.kind is KubernetesKind.trainjob:
        documents = [_train_job(config, overrides)]
    else:
        documents = [_service(config), _job(config, overrides)]
    return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=110)


def _arguments(config: RunConfig, overrides: list[str], node: dict[str, str]) -> list[str]:
    """Of ``muster``, in a pod. What depends on the machine is said: a pod sees its host's cores, not its own."""
    own = {
        "run.root": config.run.root,
        "run.name": config.run.name,
        "run.id": str(config.run.id),
        "run.resume": "true",
        "device": config.device.value,
        "launcher.nnodes": str(config.launcher.nnodes),
        "launcher.nproc_per_node": str(config.launcher.nproc_per_node),
        "train.num_threads": str(config.train.num_threads),
        "train.verify_first": "false",  # proven before it was submitted
        **node,
    }
    kept = [text for text in overrides if grammar.parse([text])[0].key_or_group not in own]
    return ["train", *kept, *(f"{key}={_quoted(value)}" for key, value in own.items())]


def _quoted(value: str) -> str:
    """A value in Hydra's grammar; Kubernetes' own $(VARIABLE) stands for a word."""
    if re.fullmatch(r"[\w./:-]+|\$\(\w+\)", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _metadata(config: RunConfig) -> dict[str, Any]:
    kubernetes = config.launcher.kubernetes
    own: dict[str, Any] = {"name": object_name(config)}
    if kubernetes.namespace is not None:
        own["namespace"] = kubernetes.namespace
    return {**own, "labels": {"app.kubernetes.io/name": "muster", **kubernetes.labels}}


def _service(config: RunConfig) -> dict[str, Any]:
    """Gives each pod the host name NAME-INDEX.NAME."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(config),
        "spec": {
            "clusterIP": "None",
            "selector": {"batch.kubernetes.io/job-name": object_name(config)},
            # Agents look for node 0 before its pod has passed any check.
            "publishNotReadyAddresses": True,
        },
    }


def _job(config: RunConfig, overrides: list[str]) -> dict[str, Any]:
    launcher, kubernetes, name = config.launcher, config.launcher.kubernetes, object_name(config)
    node = {}
    pod: dict[str, Any] = {"restartPolicy": "Never"}
    if num_hosts(launcher) > 1:
        first = f"{name}-0.{name}"
        node = {"launcher.master_addr": first, "launcher.node_rank": "$(JOB_COMPLETION_INDEX)"}
        pod |= {
            "subdomain": name,
            "initContainers": [
                {
                    "name": "wait-for-all-nodes",
                    "image": kubernetes.image,
                    "command": ["sh", "-c", _wait_for_names(name, num_hosts(launcher))],
                }
            ],
        }
    pod |= {
        "terminationGracePeriodSeconds": _grace_seconds(config),
        "containers": [
            {
                "name": CONTAINER,
                "image": kubernetes.image,
                "command": ["muster"],
                "args": _arguments(config, overrides, node),
                "env": _env(config),
                "resources": _resources(kubernetes),
                "volumeMounts": _mounts(config),
            }
        ],
        "volumes": _volumes(kubernetes),
        **kubernetes.pod_spec,
    }
    failure_rules = [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [EXIT_CONFIG]},
        },
        {
            "action": "Ignore",
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [EXIT_STOPPED]},
        },
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(config),
        "spec": {
            "completionMode": "Indexed",
            "completions": num_hosts(launcher),
            "parallelism": num_hosts(launcher),
            # One failure of the run is a failure of every pod.
            "backoffLimit": kubernetes.max_restarts * num_hosts(launcher),
            "podFailurePolicy": {"rules": failure_rules},
            "template": {"metadata": {"labels": _metadata(config)["labels"]}, "spec": pod},
        },
    }


def _wait_for_names(name: str, nnodes: int) -> str:
    """Shell that ends once every pod has a name in the network. An agent takes a host without one for a mistake;
    here it is a pod that waits for a machine, and that may take hours."""
    lookup = f"getent hosts {name}-$i.{name} > /dev/null"
    return f"i=0; while [ $i -lt {nnodes} ]; do if {lookup}; then i=$((i + 1)); else sleep 2; fi; done"


def _train_job(config: RunConfig, overrides: list[str]) -> dict[str, Any]:
    launcher, kubernetes = config.launcher, config.launcher.kubernetes
    node = {}
    if num_hosts(launcher) > 1:
        node = {
            "launcher.master_addr": "$(PET_MASTER_ADDR)",
            "launcher.master_port": "$(PET_MASTER_PORT)",
            "launcher.node_rank": "$(PET_NODE_RANK)",
        }
    pod = {
        "terminationGracePeriodSeconds": _grace_seconds(config),
        "containers": [{"name": _RUNTIME_PART, "volumeMounts": _mounts(config)}],
        "volumes": _volumes(kubernetes),
        **kubernetes.pod_spec,
    }
    part = {"name": _RUNTIME_PART, "template": {"spec": {"template": {"spec": pod}}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(config),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime",
                "name": kubernetes.runtime,
            },
            "trainer": {
                "image": kubernetes.image,
                "command": ["muster"],
                "args": _arguments(config, overrides, node),
                "env": _env(config),
                "numNodes": num_hosts(launcher),
                "numProcPerNode": launcher.nproc_per_node,
                "resourcesPerNode": _resources(kubernetes),
            },
            "runtimePatches": [
                {
                    "manager": "muster-submit",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [part]}}},
                }
            ],
        },
    }


def _grace_seconds(config: RunConfig) -> int:
    return int(config.resilience.stop_grace_seconds) + _LEAVE_SECONDS


def _env(config: RunConfig) -> list[dict[str, Any]]:
    """The data cache lies on the shared volume, unless the user says otherwise: it is prepared once."""
    given = {"MUSTER_CACHE": f"{config.run.root.rstrip('/')}/.cache", **config.launcher.kubernetes.env}
    return [
        {"name": name, "valueFrom": value}
        if isinstance(value, dict)
        else {"name": name, "value": _text(value)}
        for name, value in given.items()
    ]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _resources(kubernetes: KubernetesConfig) -> dict[str, Any]:
    requests: dict[str, str] = {"cpu": str(kubernetes.cpus_per_node)}
    limits: dict[str, str] = {}
    if kubernetes.mem is not None:
        requests["memory"] = limits["memory"] = kubernetes.mem
    if kubernetes.gpus_per_node:
        requests[_GPU] = limits[_GPU] = str(kubernetes.gpus_per_node)
    return {"requests": requests, "limits": limits} if limits else {"requests": requests}


def _mounts(config: RunConfig) -> list[dict[str, str]]:
    return [
        {"name": "runs", "mountPath": config.run.root},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]


def _volumes(kubernetes: KubernetesConfig) -> list[dict[str, Any]]:
    """The shared claim, and shared memory: a container's own is 64 MiB."""
    return [
        {"name": "runs", "persistentVolumeClaim": {"claimName": kubernetes.claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": kubernetes.shm}},
    ]


def require_kubectl() -> None:
    """Raise ConfigError where there is no kubectl."""
    if shutil.which("kubectl") is None:
        raise ConfigError(
            "launcher",
            "kubernetes",
            "hands the job over with the command kubectl, which this machine does not have",
            "install kubectl, or write the manifest with --dry-run and apply it elsewhere",
        )


def submit(path: Path, text: str, config: RunConfig) -> Outcome:
    """Write the manifest and apply it.

    Raises:
        ConfigError: the file cannot be written, or kubectl refused; its own words are in the message.
    """
    write_atomically(path, text)
    done = subprocess.run(["kubectl", "apply", "-f", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise ConfigError("launcher", "kubernetes", f"kubectl refused {path}: {said}", "change what it names")
    kubernetes, name = config.launcher.kubernetes, object_name(config)
    where = f" --namespace {kubernetes.namespace}" if kubernetes.namespace else ""
    pods = f"batch.kubernetes.io/job-name={name}"
    if kubernetes.kind is KubernetesKind.trainjob:
        pods = f"jobset.sigs.k8s.io/jobset-name={name}"
    return Outcome(
        0,
        f"{done.stdout.strip()}\n"
        f"  watch  kubectl logs{where} --follow --prefix --selector {pods}\n"
        f"  stop   kubectl delete{where} -f {shlex.quote(str(path))}\n"
        f"  again  kubectl apply{where} -f {shlex.quote(str(path))}, once it is deleted",
    )
