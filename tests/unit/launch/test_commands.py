"""The `muster` command as a user meets it: help, typos, completion, doctor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_helpers import REPO

from launch.__main__ import HELP
from launch.completion import complete
from launch.doctor import examine
from launch.outcome import Outcome
from launch.sample import SamplingOptions, parse_options
from launch.train import main as train_main
from launch.train import split_arguments
from parallel.errors import ConfigError
from trainer.config import RunConfig


def muster(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )


def imports_of(arguments: list[str], cwd: Path) -> set[str]:
    """The heavy packages that a command line has imported by its end."""
    heavy = "{'torch', 'hydra', 'datasets', 'matplotlib', 'wandb'}"
    code = (
        "import sys; from launch.__main__ import main; "
        f"sys.argv = ['muster', *{arguments!r}]; main(); "
        f"print(*({heavy} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    return set(done.stderr.splitlines()[-1].split())


def test_help_fits_a_screen(tmp_path: Path) -> None:
    done = muster("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == HELP
    assert len(HELP.splitlines()) <= 30 and max(map(len, HELP.splitlines())) <= 110


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--help"], set()),
        (["--version"], set()),
        (["trian"], set()),
        (["completion", "bash"], set()),
        (["train", "optim.lrr=1"], {"hydra"}),
        (["train", "-m", "layout=dense,mixtrl"], {"hydra"}),
        (["train", "parallel.ep=3"], {"hydra"}),
        (["train", "data=text", "data.path=none.txt"], {"hydra"}),
        (["train", "--help"], {"hydra"}),
        (["resume", "nowhere"], {"hydra"}),
    ],
    ids=" ".join,
)
def test_what_does_not_train_imports_no_torch(
    tmp_path: Path, arguments: list[str], allowed: set[str]
) -> None:
    assert imports_of(arguments, tmp_path) == allowed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "command=trian: one of train, resume, "),
        (["train", "layout=mixtrl"], "Fix: layout=mixtral."),
        (["train", "parallel.ep=3", "layout=mixtral"], "parallel.ep=3: ep is carved from dp_shard·cp·tp = 1"),
        (["train", "launcher=slurm"], "launcher.name=slurm: is for `muster submit`"),
        (["train", "run.resume=true"], "run.resume=True: goes on with the run of an id"),
        (["train", "launcher.nproc_per_node=3"], "train.global_batch=8: must be a multiple of dp (3)"),
        (
            ["train", "launcher.nnodes=2", "train.global_batch=8"],
            "launcher.master_addr=None: launcher.nnodes=2",
        ),
        (
            ["train", "device=cuda", "launcher.nproc_per_node=64", "train.global_batch=64"],
            "device=cuda: takes ",
        ),
        (["train", "-m", "layout=dense,mixtrl"], "layout=mixtrl: must be one of"),
        (["train", "-m", "optim.lr=1e-3,abc"], "optim.lr=abc: must be a number"),
        (["train", "-m", "optim.lrr=1,2"], "did you mean optim.lr"),
        (["train", "-m", "--cfg", "job"], "cannot be combined"),
        (["train", "--cfg", "jobs"], "invalid choice: 'jobs'"),
        (["train", "--bogus"], "overrides have no dashes. Fix: bogus"),
        (["train", "--config-name=x"], "there is one main config"),
        (["train", "--config-dir=nowhere"], "--config-dir=nowhere: is not a directory"),
        (["train", "run.root=/proc/none"], "cannot be written"),
        (["train", "data=text", "data.path=none.txt"], "none.txt"),
        (["resume"], "which run?"),
        (["resume", "nowhere"], "RUN_DIR=nowhere: does not exist"),
        (["report", "."], "is not a run directory"),
        (["generate", "nowhere"], "does not exist"),
        (["completion", "fish"], "one of bash, zsh"),
        (["doctor", "now"], "takes no arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message_and_exit_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = muster(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_cfg_and_info_come_from_hydra(tmp_path: Path) -> None:
    done = muster("train", "--cfg", "job", "layout=switch", "optim.lr=5", cwd=tmp_path)
    assert done.returncode == 0 and "capacity_factor: 1.25" in done.stdout and "lr: 5.0" in done.stdout
    done = muster("train", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "layout: deepseek, dense, ernie, " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_a_config_asks_of_hydra_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that asks for nothing is composed once and not handed to Hydra; both train the same."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    asks = "hydra: {job: {env_set: {MUSTER_TEST_SAID: hello}}}"
    (folder / "asks.yaml").write_text(f"# @package _global_\n{asks}\noptim: {{lr: 0.25}}\n")
    (folder / "plain.yaml").write_text("# @package _global_\noptim: {lr: 0.25}\n")
    seen = []

    def note(config: RunConfig) -> Outcome:
        seen.append((config.optim.lr, config.train.steps, os.environ.get("MUSTER_TEST_SAID")))
        return Outcome(7)

    monkeypatch.setattr("launch.train.train", note)
    for name in ("plain", "asks"):
        assert train_main(["--config-dir", str(tmp_path), f"experiment={name}", "train.steps=3"]).code == 7
    assert seen == [(0.25, 3, None), (0.25, 3, "hello")]


def test_flags_and_overrides_in_any_order() -> None:
    flags, overrides, args = split_arguments(["a=1", "-m", "b=2", "--config-dir", "conf", "c=-1"])
    assert (flags, overrides) == (["-m", "--config-dir", "conf"], ["a=1", "b=2", "c=-1"])
    assert args.multirun and args.config_dir == "conf"


@pytest.mark.parametrize(
    ("line", "choices"),
    [
        ("muster tr", ["train "]),
        ("muster --v", ["--version "]),
        ("muster train lay", ["layout.", "layout="]),
        ("muster train layout=s", ["layout=sinkhorn", "layout=skywork", "layout=switch"]),
        ("muster train model=tiny layout=d", ["layout=deepseek", "layout=dense"]),
        ("muster train optim.l", ["optim.lr="]),
        ("muster train layout.score=s", ["layout.score=softmax", "layout.score=sigmoid"]),
        ("muster train -m experiment=", ["experiment=quickstart"]),
        ("muster train --mu", ["--multirun "]),
        ("muster completion ", ["bash", "zsh"]),
        ("muster train 'unfinished", []),
    ],
)
def test_completion(line: str, choices: list[str]) -> None:
    assert complete(line) == choices


def test_completion_of_run_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "quickstart" / "20261121-213045-x7"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    assert complete("muster resume ") == ["runs/quickstart/20261121-213045-x7"]
    assert complete("muster report runs/qu") == ["runs/quickstart/20261121-213045-x7"]
    assert complete("muster generate runs/quickstart/20261121-213045-x7 top") == ["top_p=", "top_k="]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("word", "replies"), [("layout=de", "deepseek dense"), ("mod", "model. model=")])
def test_the_bash_script_completes(tmp_path: Path, word: str, replies: str) -> None:
    """As readline would call it: `=` breaks words, so only what follows it is replaced."""
    command = tmp_path / "muster"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m launch "$@"\n')
    command.chmod(0o755)
    line = f"muster train {word}"
    script = (
        'eval "$(muster completion bash)"\n'
        f'COMP_LINE="{line}" COMP_POINT={len(line)} COMP_WORDS=(muster train {word}) COMP_CWORD=2\n'
        '_muster_complete; echo "${COMPREPLY[@]}"; complete -p muster'
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [replies, "complete -o nospace -F _muster_complete muster"], (
        done.stderr
    )


def test_sampling_options() -> None:
    options = ["prompt=a = b", "top_p=0.5", "parallel.ep=2", "seed=3"]
    assert parse_options(options) == (SamplingOptions("a = b", 64, 0.8, 0.5, 3), ["parallel.ep=2"])
    for arguments, message in (
        (["promt=x"], "did you mean prompt"),
        (["seed=x"], "must be a whole number"),
        (["top_p=0"], r"must be in \(0, 1\]"),
        (["max_new_tokens=0"], "must be above 0"),
        (["temperature=-1"], "must not be negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_options(arguments)


def test_doctor_finds_this_machine() -> None:
    findings = {(found.section, found.name): found for found in examine()}
    assert findings["machine", "python"].state == findings["torch", "gloo"].state == "ok"
    assert float(findings["torch", "matmul"].value.split()[0].replace(",", "")) > 0
    assert "fp32 in fp32" in findings["torch", "experts, cpu"].value
    assert {("packages", "hydra-core"), ("storage", "this folder"), ("w&b", "account")} <= findings.keys()
    assert not [found for found in findings.values() if found.state == "bad"]


def test_doctor_misses_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (found,) = [found for found in examine() if found.name == "compiler"]
    assert (found.value, found.state, found.advice) == ("none", "note", "install g++ for train.compile=true")
