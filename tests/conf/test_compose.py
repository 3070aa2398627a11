"""Every file of conf/ composes to a config that is valid, and every mistake of a user is one message."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.errors import ConfigError
from trainer.compose import CONF_DIR, apply_overrides, compose, freeze, load_frozen
from trainer.config import Machine, RunConfig, resolve
from trainer.config_moe import Score
from trainer.rules import validate

GROUPS = sorted(folder.name for folder in CONF_DIR.iterdir() if folder.is_dir())
CHOICES = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((CONF_DIR / group).glob("*.yaml"))
    if group != "sweep"
]
NEEDS = {
    ("data", "text"): ["data.path=x.txt"],
    ("data", "jsonl"): ["data.path=x.jsonl"],
    ("data", "parquet"): ["data.path=x.parquet"],
    ("data", "hub"): ["data.name=owner/name"],
    ("optim", "wsd"): ["train.steps=100"],
    ("launcher", "slurm"): ["launcher.slurm.cpus_per_node=8", "launcher.slurm.gpus_per_node=8"],
    ("launcher", "kubernetes"): [
        *("launcher.kubernetes.cpus_per_node=8", "launcher.kubernetes.gpus_per_node=8"),
        *("launcher.kubernetes.image=a/b:1", "launcher.kubernetes.claim=c", "run.root=/runs"),
    ],
    ("launcher", "ssh"): ["launcher.hostfile=hosts", "launcher.nnodes=2", "train.global_batch=16"],
}


def checked(overrides: list[str], config_dir: str | None = None) -> RunConfig:
    config = resolve(compose(overrides, config_dir), Machine(num_cpus=8, num_gpus=8))
    validate(config)
    return config


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_file_composes_and_is_valid(group: str, choice: str) -> None:
    checked([f"{group}={choice}", *NEEDS.get((group, choice), [])])


@pytest.mark.parametrize("path", sorted((CONF_DIR / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_composes(path: Path) -> None:
    assert compose([f"sweep={path.stem}"]).run.name != compose([]).run.name, "its points share a folder"


LAYOUTS = [path.stem for path in sorted((CONF_DIR / "layout").glob("*.yaml"))]
MODELS = ["tiny", "small"]


@pytest.mark.parametrize(("model", "layout"), list(itertools.product(MODELS, LAYOUTS)))
def test_sizes_go_with_every_layout(model: str, layout: str) -> None:
    ep = 1 if layout == "dense" else 4
    config = checked([f"model={model}", f"layout={layout}", f"parallel.ep={ep}"])
    assert (config.layout.name, config.model.name) == (layout, model)


def test_a_published_model_brings_its_layout() -> None:
    assert checked(["model=mixtral_8x7b"]).layout.name == "mixtral"
    assert checked(["model=llama3_8b"]).layout.num_experts == 0
    deepseek = checked(["model=deepseek_v3"])
    assert (deepseek.layout.num_experts, deepseek.layout.score) == (256, Score.sigmoid)


def test_quickstart_is_the_main_job() -> None:
    config = checked(["experiment=quickstart"])
    assert (config.launcher.nproc_per_node, config.parallel.ep, config.parallel.dp_shard) == (2, 2, 2)
    assert (config.layout.name, config.model.name, config.run.name) == ("mixtral", "tiny", "quickstart")


MISTAKES = [
    ("optim.lrr=1", "optim.lrr=1: there is no such key. Fix: did you mean optim.lr=1."),
    ("lr=1", "lr=1: there is no such key. Fix: did you mean optim.lr=1."),
    ("steps=5", "steps=5: there is no such key. Fix: did you mean train.steps=5."),
    ("+foo=1", "foo=1: there is no such key"),
    ("++foo.bar=1", "foo.bar=1: there is no such key"),
    ("+optim.lrr=1", "optim.lrr=1: there is no such key. Fix: did you mean optim.lr=1."),
    ("~foo", "foo=: there is no such key"),
    ("~optim.lr", "~optim.lr=: a field of the schema cannot be deleted"),
    ("layot=dense", "layot=dense: there is no such key. Fix: layout=… with one of deepseek, dense,"),
    ("layout=mixtrl", "sinkhorn, skywork, switch. Fix: layout=mixtral."),
    ("+layout=dense", "+layout=dense: the group is chosen without a +. Fix: layout=dense."),
    ("layout={top_k: 3}", "is a config group, chosen by name"),
    ("experiment=null", "experiment=null: a group is left out by deleting its choice. Fix: '~experiment'."),
    ("optim/lr=1", "optim/lr=1: there is no such config group. Fix: did you mean optim.lr."),
    ("train.steps=abc", "train.steps=abc: must be a whole number. Fix: train.steps=100."),
    ("train.steps=1e3", "train.steps=1000.0: must be a whole number. Fix: train.steps=1000."),
    ("train.steps=null", "train.steps=null: must be a whole number"),
    ("optim.lr=fast", "optim.lr=fast: must be a number. Fix: optim.lr=0.001."),
    (
        "train.activation_checkpointing=maybe",
        "must be true or false. Fix: train.activation_checkpointing=false.",
    ),
    ("layout.score=foo", "layout.score=foo: must be one of softmax, sigmoid. Fix: layout.score=softmax."),
    ("logger.wandb.mode=ofline", "must be one of offline, online, disabled. Fix: logger.wandb.mode=offline."),
    ("train=5", "train=5: must be a section, not a value. Fix: name one of its fields: train.steps,"),
    ("train={stepz: 3}", "train.stepz={stepz: 3}: there is no such key. Fix: did you mean train.steps"),
    (
        "layout=dense,mixtral",
        "takes one value; several make a sweep. Fix: muster train -m layout=dense,mixtral.",
    ),
    ("optim.lr=[1", "optim.lr=[1: cannot be read as an override"),
    ("eval.sample_prompt=def main(", "quote a value with special characters: \"eval.sample_prompt='…'\""),
    ("dense", "dense=: an override is key=value"),
    ("--train.steps=3", "overrides have no dashes. Fix: train.steps=3."),
    (
        "data.path=${oc.env:MUSTER_NO_SUCH_VARIABLE}",
        "Environment variable 'MUSTER_NO_SUCH_VARIABLE' not found",
    ),
    (
        "hydra.searchpath=[file:///no/such/folder]",
        "hydra.searchpath=file:///no/such/folder: is not a directory",
    ),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_mistakes(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_free_dicts_take_any_key() -> None:
    config = compose(["model.kwargs.width=3", "+data.kwargs.a=x", "++layout.kwargs.deep.er=1"])
    assert (config.model.kwargs, config.data.kwargs) == ({"width": 3}, {"a": "x"})
    assert config.layout.kwargs == {"deep": {"er": 1}}


YAML_MISTAKES = {
    "foo: 1": "foo=: there is no such key (In 'experiment/mine'). ",
    "train:\n  stepz: 1": "train.stepz=: there is no such key (In 'experiment/mine'). Fix: did you mean",
    "train:\n  steps: abc": "train.steps=abc: must be a whole number (In 'experiment/mine')",
    "train: [": "is not valid YAML: while parsing a flow node",
    "defaults:\n  - override /layout: nope": "layout/nope=: a defaults list names it and no such file exists",
}


@pytest.mark.parametrize("text", YAML_MISTAKES)
def test_mistakes_in_the_users_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError, match=re.escape(YAML_MISTAKES[text])):
        compose(["experiment=mine"], str(tmp_path))


@pytest.mark.parametrize("how", ["config_dir", "searchpath"])
def test_the_users_own_groups(tmp_path: Path, how: str) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain:\n  steps: 7\n")
    if how == "config_dir":
        config = checked(["experiment=mine"], str(tmp_path))
    else:
        config = checked(["experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    assert config.train.steps == 7
    with pytest.raises(ConfigError, match=r"must be one of .*mine.*Fix: experiment=mine"):
        compose(["experiment=mne"], str(tmp_path))


def test_freeze_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MUSTER_CACHE", raising=False)
    config = checked(
        [
            "layout=deepseek",
            "data.path=books/*.txt",
            "data.source=text",
            "model.kwargs.width=3",
            "callbacks=[{target: 'a.b:C', kwargs: {x: 1}}]",
            "layout.capacity_factor=1.5",
        ]
    )
    freeze(config, tmp_path / "config.yaml")
    assert "score: sigmoid" in (tmp_path / "config.yaml").read_text()
    loaded = load_frozen(tmp_path / "config.yaml")
    assert (loaded.data.path, loaded.run.root) == (str(tmp_path / "books/*.txt"), str(tmp_path / "runs"))
    assert loaded.data.cache_dir == str(tmp_path / ".cache/muster")
    assert (loaded.layout, loaded.callbacks, loaded.model) == (config.layout, config.callbacks, config.model)
    freeze(loaded, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "config.yaml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.yaml", "config.yaml"]


DAMAGE = {
    "optim:\n  lrr: 1\n": r"optim\.lrr=: there is no such key \(in .*config\.yaml\)",
    "train:\n  steps: abc\n": r"train\.steps=abc: must be a whole number \(in .*config\.yaml\)",
    "train: [\n": r"config=.*config\.yaml: cannot be read",
    "": r"config=.*config\.yaml: is not a mapping",
    "\x00\x01": r"config=.*config\.yaml: cannot be read",
}


@pytest.mark.parametrize("text", DAMAGE)
def test_a_damaged_frozen_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=DAMAGE[text]):
        load_frozen(tmp_path / "config.yaml")


def test_a_missing_frozen_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_frozen(tmp_path / "config.yaml")


def test_apply_overrides_changes_a_copy() -> None:
    config = checked(["experiment=quickstart"])
    changed = apply_overrides(config, ["train.steps=9", "layout.score=sigmoid", "model.kwargs.a=1"])
    assert (changed.train.steps, changed.layout.score, changed.model.kwargs) == (9, Score.sigmoid, {"a": 1})
    assert config == checked(["experiment=quickstart"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layout=dense", "a run keeps the group files it was composed from"),
        ("optim.lrr=1", "did you mean optim.lr=1"),
        ("train.steps=abc", "train.steps=abc: must be a whole number"),
        ("train.steps=1,2", "takes one value"),
        ("+foo=1", "there is no such key"),
    ],
)
def test_apply_overrides_mistakes(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        apply_overrides(RunConfig(), [override])


def test_composing_needs_no_torch() -> None:
    code = (
        "import sys; from trainer.compose import compose; from trainer.config import *; "
        "from trainer.rules import validate; "
        "c = resolve(compose(['layout=switch']), Machine(2)); validate(c); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=CONF_DIR.parent).returncode == 0
