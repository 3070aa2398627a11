"""The manifests of `muster submit launcher=kubernetes`, held against the schemas that Kubernetes and Kubeflow
publish (offline, in the packages kubernetes-validate and kubeflow-trainer-api). No cluster is involved."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from launch_helpers import REPO

from launch import submit
from launch.kubernetes import manifest
from launch.submit import complete
from parallel.errors import ConfigError
from trainer.compose import compose
from trainer.config import Device, Machine, RunConfig, resolve
from trainer.rules import validate

NODES = [
    "launcher=kubernetes",
    "run.root=/runs",
    "run.name=exp",
    "run.id=a1",
    "launcher.kubernetes.image=registry.example.com/muster:1.0",
    "launcher.kubernetes.claim=training",
    "launcher.kubernetes.cpus_per_node=16",
    "launcher.kubernetes.gpus_per_node=8",
    "launcher.kubernetes.mem=400Gi",
    "launcher.nnodes=4",
    "train.global_batch=64",
    "parallel.ep=8",
]
EXTRAS = [
    "launcher.kubernetes.namespace=ml",
    "launcher.kubernetes.labels={kueue.x-k8s.io/queue-name: gpus}",
    "launcher.kubernetes.env.NCCL_DEBUG=INFO",
    "launcher.kubernetes.env.WORKERS=4",
    "launcher.kubernetes.env.WANDB_API_KEY={secretKeyRef: {name: wandb, key: api-key}}",
    "launcher.kubernetes.pod_spec.nodeSelector={gpu: h100}",
    "launcher.kubernetes.pod_spec.tolerations=[{key: nvidia.com/gpu, operator: Exists}]",
]
TRAINJOB = "launcher.kubernetes.kind=trainjob"
KUBERNETES_VERSIONS = ["1.31", "1.37"]


def documents(*overrides: str) -> list[dict[str, Any]]:
    asked = [*NODES, *overrides]
    config = complete(compose(asked))
    return list(yaml.safe_load_all(manifest(config, asked)))


def check_train_job(document: dict[str, Any]) -> None:
    """Types, and no field that the schema does not have: those would be lost on the way."""
    assert TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(document)).to_dict() == document


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("overrides", [[], EXTRAS, ["launcher.nnodes=1"]], ids=["plain", "extras", "one"])
def test_job_and_service_are_valid(version: str, overrides: list[str]) -> None:
    found = documents(*overrides)
    assert [document["kind"] for document in found] == ["Service", "Job"]
    for document in found:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("overrides", [[], EXTRAS, ["launcher.nnodes=1"]], ids=["plain", "extras", "one"])
def test_train_job_is_valid(overrides: list[str]) -> None:
    (document,) = documents(TRAINJOB, *overrides)
    check_train_job(document)


def test_the_schemas_would_find_a_mistake() -> None:
    service, job = documents()
    job["spec"]["completionmode"] = job["spec"].pop("completionMode")
    with pytest.raises(kubernetes_validate.ValidationError, match="completionmode"):
        kubernetes_validate.validate(job, KUBERNETES_VERSIONS[-1], strict=True)
    service["spec"]["clusterIP"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, KUBERNETES_VERSIONS[-1], strict=True)
    (train_job,) = documents(TRAINJOB)
    train_job["spec"]["trainer"]["numNode"] = train_job["spec"]["trainer"].pop("numNodes")
    with pytest.raises(AssertionError):
        check_train_job(train_job)
    train_job["spec"]["trainer"]["numNodes"] = "four"
    with pytest.raises(ValueError, match="numNodes"):
        check_train_job(train_job)


def pod_config(arguments: list[str], index: str) -> RunConfig:
    """What `muster train` in a pod composes, with Kubernetes' variables filled in."""
    assert arguments[0] == "train"
    values = {
        "JOB_COMPLETION_INDEX": index,
        "PET_NODE_RANK": index,
        "PET_MASTER_ADDR": "exp-a1-node-0-0.exp-a1",
    }
    filled = []
    for argument in arguments[1:]:
        for name, value in {**values, "PET_MASTER_PORT": "29500"}.items():
            argument = argument.replace(f"$({name})", value)
        assert "$(" not in argument
        filled.append(argument)
    config = resolve(compose(filled), Machine(num_cpus=192, num_gpus=8))
    validate(config)
    return config


@pytest.mark.parametrize("kind", ["job", "trainjob"])
def test_a_pod_composes_the_submitted_config(kind: str) -> None:
    asked = [*EXTRAS, f"launcher.kubernetes.kind={kind}", "optim.lr=3e-4", "run.name='my exp'", "run.id=b"]
    document = documents(*asked)[-1]
    if kind == "job":
        arguments = document["spec"]["template"]["spec"]["containers"][0]["args"]
    else:
        arguments = document["spec"]["trainer"]["args"]
    config, submitted = pod_config(arguments, "3"), complete(compose([*NODES, *asked]))
    assert config.run.resume and config.launcher.node_rank == 3
    addresses = {"job": ("my-exp-b-0.my-exp-b", 29400), "trainjob": ("exp-a1-node-0-0.exp-a1", 29500)}
    assert (config.launcher.master_addr, config.launcher.master_port) == addresses[kind]
    # The host has 192 cores, the pod 16 of them for 8 processes.
    assert config.train.num_threads == 2 and config.device is Device.cuda
    config.run.resume = False
    for name in ("node_rank", "master_addr", "master_port"):
        setattr(config.launcher, name, getattr(submitted.launcher, name))
    assert config == submitted


def test_what_the_job_says() -> None:
    service, job = documents(
        *EXTRAS, "resilience.stop_grace_seconds=200", "launcher.kubernetes.max_restarts=2"
    )
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert spec["completions"] == spec["parallelism"] == 4 and spec["backoffLimit"] == 8
    assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"] == "exp-a1"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "exp-a1"}
    assert service["metadata"]["namespace"] == job["metadata"]["namespace"] == "ml"
    assert pod["terminationGracePeriodSeconds"] > 200, "Kubernetes must not kill what is still saving"
    rules = [
        (rule["action"], rule.get("onExitCodes", {}).get("values"))
        for rule in spec["podFailurePolicy"]["rules"]
    ]
    assert rules == [("FailJob", [2]), ("Ignore", [75]), ("Ignore", None)]
    assert container["resources"]["limits"] == {"memory": "400Gi", "nvidia.com/gpu": "8"}
    assert container["volumeMounts"][0] == {"name": "runs", "mountPath": "/runs"}
    env = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
    assert env == {
        "MUSTER_CACHE": "/runs/.cache",
        "NCCL_DEBUG": "INFO",
        "WORKERS": "4",
        "WANDB_API_KEY": {"secretKeyRef": {"name": "wandb", "key": "api-key"}},
    }
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert pod["nodeSelector"] == {"gpu": "h100"}


def test_pods_wait_until_all_have_names(tmp_path: Path) -> None:
    """The shell of the init container, run here with a getent that finds each name at the second look."""
    (waiting,) = documents()[-1]["spec"]["template"]["spec"]["initContainers"]
    getent = tmp_path / "getent"
    getent.write_text('#!/bin/sh\necho "$2" >> asked; [ "$(grep -cx "$2" asked)" = 2 ]\n')
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    for command in ("getent", "sleep"):
        (tmp_path / command).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(waiting["command"], cwd=tmp_path, env=env, check=True, timeout=60)
    names = [f"exp-a1-{index}.exp-a1" for index in range(4) for _ in range(2)]
    assert (tmp_path / "asked").read_text().split() == names


def test_no_pod_waits_for_another_when_there_is_one() -> None:
    pod = documents("launcher.nnodes=1")[-1]["spec"]["template"]["spec"]
    assert "initContainers" not in pod
    assert not [a for a in pod["containers"][0]["args"] if a.startswith("launcher.node_rank")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launcher.kubernetes.image=null"], "launcher.kubernetes.image=None: must be given"),
        (["launcher.kubernetes.claim=null"], "launcher.kubernetes.claim=None: must be given"),
        (["launcher.kubernetes.cpus_per_node=null"], "how many cores of each compute node"),
        (["run.root=runs"], "run.root=runs: .* absolute path. Fix: run.root=/runs"),
        (["launcher.kubernetes.mem=400GB"], "amount of memory as Kubernetes writes it"),
        (
            ["launcher.kubernetes.gpus_per_node=4", "device=cuda", "launcher.nproc_per_node=8"],
            "takes a GPU for",
        ),
        (["launcher.kubernetes.pod_spec.volumes=[]"], "follows from launcher.kubernetes.claim"),
        ([TRAINJOB, "launcher.kubernetes.pod_spec.dnsPolicy=Default"], "a TrainJob may only set affinity"),
        (["launcher.kubernetes.env.PET_NNODES=3"], "is set by Kubeflow"),
        (["launcher.kubernetes.kind=jobs"], "must be one of job, trainjob"),
        (["run.name=" + "x" * 60], "a shorter run.name"),
    ],
)
def test_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        documents(*overrides)


def test_dry_run_prints_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = submit.main([*NODES, "--dry-run"])
    assert list(yaml.safe_load_all(outcome.message)) == documents()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="the pods compose the config"):
        submit.main([*NODES, "--dry-run", "--config-dir", str(tmp_path)])


def test_without_kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="command kubectl, which this machine does not have"):
        submit.main(NODES)
    assert list(tmp_path.iterdir()) == []


BLOCKS = [
    text
    for page in sorted((REPO / "docs").glob("launching*.md"))
    for text in re.findall(r"<!-- run on kubernetes -->\n```bash\n(.*?)```", page.read_text(), re.DOTALL)
]
"""What the page on launching says of Kubernetes."""


def test_the_page_shows_both_kinds() -> None:
    assert len(BLOCKS) == 3 and len([text for text in BLOCKS if "kind=trainjob" in text]) == 1


@pytest.mark.parametrize("text", BLOCKS)
def test_blocks_of_the_page(text: str, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for document in yaml.safe_load_all(done.stdout):
        if document["kind"] == "TrainJob":
            check_train_job(document)
        else:
            kubernetes_validate.validate(document, KUBERNETES_VERSIONS[-1], strict=True)
    assert list(tmp_path.iterdir()) == []


def kubectl(folder: Path, script: str) -> None:
    """A stand-in for the command: there is no cluster that a test could submit to."""
    path = folder / "kubectl"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_kubectl_gets_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    kubectl(tmp_path, 'echo "$@" > called; cat "$3" > got; echo "job.batch/exp-a1 created"')
    outcome = submit.main(NODES)
    assert outcome.code == 0 and outcome.message.startswith("job.batch/exp-a1 created\n")
    assert "kubectl delete -f exp-a1.yaml" in outcome.message
    assert (tmp_path / "called").read_text() == "apply -f exp-a1.yaml\n"
    assert list(yaml.safe_load_all((tmp_path / "got").read_text())) == documents()
    submit.main([*NODES, "--output", "elsewhere.yaml"])
    assert (tmp_path / "called").read_text() == "apply -f elsewhere.yaml\n"
    kubectl(tmp_path, "echo 'The connection to the server was refused' >&2; exit 1")
    with pytest.raises(
        ConfigError, match=r"kubectl refused exp-a1\.yaml: The connection to the server was refused"
    ):
        submit.main(NODES)
