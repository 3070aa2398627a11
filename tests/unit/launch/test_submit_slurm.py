"""`muster submit launcher=slurm`: the script, what it does with each exit code, mistakes; Slurm's variables.

tests/cluster/test_slurm.py runs the same on a real Slurm.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from launch import submit
from launch.slurm import batch_script
from launch.submit import complete
from parallel.errors import ConfigError
from trainer.compose import compose
from trainer.launchers import time_limit_seconds
from trainer.slurm import first_host, slurm_variables, tasks_per_node

NODES = [
    "launcher=slurm",
    "run.name=exp",
    "run.id=a1",
    "launcher.nnodes=4",
    "launcher.slurm.cpus_per_node=64",
    "train.global_batch=64",
]
GPUS = ["launcher.slurm.gpus_per_node=8", "launcher.slurm.gpu_type=h100"]


def script(*overrides: str, run_dir: Path = Path("/runs/exp/a1")) -> str:
    return batch_script(complete(compose([*NODES, *overrides])), run_dir)


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_what_is_asked_of_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["mem=480G", "time=1-12:00:00", "partition=gpu", "account=lab", "qos=high", "constraint='a&b'"]
    more = ["launcher.slurm.sbatch_args=['--exclusive', '--mail-type=END']", *GPUS]
    assert directives(script(*(f"launcher.slurm.{entry}" for entry in asked), *more)) == [
        "--job-name=exp/a1",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--cpus-per-task=64",
        "--gpus-per-node=h100:8",
        "--mem=480G",
        "--time=1-12:00:00",
        "--partition=gpu",
        "--account=lab",
        "--qos=high",
        '--constraint="a&b"',
        "--requeue",
        "--signal=USR1@180",
        "--output=/runs/exp/a1/logs/slurm-%j.out",
        "--open-mode=append",
        f"--chdir={tmp_path}",
        "--exclusive",
        "--mail-type=END",
    ]
    plain = directives(script("launcher.slurm.requeue=false"))
    assert "--no-requeue" in plain and not [o for o in plain if o.startswith(("--gpus", "--mem", "--time"))]


def test_the_compute_nodes_count_not_this_machine() -> None:
    config = complete(compose([*NODES, *GPUS]))
    assert (config.device.value, config.launcher.nproc_per_node, config.train.num_threads) == ("cuda", 8, 8)
    assert config.parallel.dp_shard == 32
    config = complete(compose(NODES))
    assert (config.device.value, config.launcher.nproc_per_node, config.train.num_threads) == ("cpu", 1, 64)


def run_script(
    folder: Path, code: int, *overrides: str, saves: bool = False, state: str = "RUNNING", arguments: str = ""
) -> tuple[int, str, list[str]]:
    """Run the script with stand-ins for Slurm's commands. Returns its exit code, what it printed, and the calls."""
    run_dir, commands = folder / "my run", folder / "bin"
    (run_dir / "checkpoints").mkdir(parents=True)
    commands.mkdir()
    checkpoint = run_dir / "checkpoints" / "step-00000007"
    save = f"mkdir '{checkpoint}'; touch '{checkpoint}/manifest.json'" if saves else ":"
    stand_ins = {
        # As each node would run it, here for node 1 alone.
        "srun": 'while [ "$1" != bash ]; do echo "srun $1" >> calls; shift; done\n'
        f'SLURM_NODEID=1 "$@"\n{save}\nexit {code}',
        "muster": 'for word in "$@"; do echo "muster $word" >> calls; done',
        "scontrol": 'case "$*" in "show hostnames"*) printf "n1\\nn2\\n";;\n'
        '"show node n1") echo "NodeName=n1 NodeAddr=10.0.0.1 Port=6818";;\n'
        f'"--oneliner show job"*) echo "JobId=7 JobState={state} Reason=None";;\n'
        '*) echo "scontrol $*" >> calls;; esac',
    }
    for name, body in stand_ins.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    setup = f"launcher.slurm.setup=['export PATH={commands}:$PATH']"
    path = folder / "job.sbatch"
    path.write_text(script(setup, *overrides, run_dir=run_dir))
    env = {**os.environ, "SLURM_JOB_ID": "1007", "SLURM_JOB_NODELIST": "n[1-4]"}
    done = subprocess.run(
        ["bash", str(path), *arguments.split()], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.stderr == ""
    calls = folder / "calls"
    return done.returncode, done.stdout, calls.read_text().splitlines() if calls.exists() else []


def test_every_node_resumes_the_run(tmp_path: Path) -> None:
    code, output, calls = run_script(tmp_path, 0, arguments="train.steps=600")
    assert code == 0 and "job 1007, start 1, on n[1-4]" in output
    assert [call for call in calls if call.startswith("srun")] == [
        "srun --nodes=4",
        "srun --ntasks=4",
        "srun --ntasks-per-node=1",
        "srun --cpus-per-task=64",
        "srun --kill-on-bad-exit=0",
        "srun --wait=180",
    ]
    assert [call.removeprefix("muster ") for call in calls if call.startswith("muster")] == [
        "resume",
        str(tmp_path / "my run"),
        "launcher.master_addr=10.0.0.1",
        "launcher.master_port=29407",
        "train.steps=600",
        "launcher.node_rank=1",
    ]


def test_one_node_needs_no_address(tmp_path: Path) -> None:
    _, _, calls = run_script(tmp_path, 0, "launcher.nnodes=1", "launcher.slurm.srun_args=['--cpu-bind=none']")
    assert "srun --cpu-bind=none" in calls
    assert [call for call in calls if call.startswith("muster")] == [
        "muster resume",
        f"muster {tmp_path / 'my run'}",
    ]


def test_a_chosen_port_is_kept(tmp_path: Path) -> None:
    _, _, calls = run_script(tmp_path, 0, "launcher.master_port=4000")
    assert "muster launcher.master_port=4000" in calls


@pytest.mark.parametrize(
    ("code", "saves", "state", "requeue", "queued_again"),
    [
        (75, True, "RUNNING", "true", True),
        (75, True, "RUNNING", "false", False),
        (75, True, "CANCELLED", "true", False),
        (75, False, "RUNNING", "true", False),
        (0, True, "RUNNING", "true", False),
        (2, False, "RUNNING", "true", False),
        (70, True, "RUNNING", "true", False),
    ],
)
def test_what_follows_from_an_exit_code(
    tmp_path: Path, code: int, saves: bool, state: str, requeue: str, queued_again: bool
) -> None:
    asked = f"launcher.slurm.requeue={requeue}"
    found, output, calls = run_script(tmp_path, code, asked, saves=saves, state=state)
    assert found == code
    assert ("scontrol requeue 1007" in calls) == queued_again
    assert ("No new checkpoint since this start" in output) == (code == 75 and not saves)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("12:00:00", 43200), ("1-12", 129600), ("1-12:30", 131400), ("2-00:00:01", 172801)]
    + [(text, None) for text in ("90", "43200", "30:00", "1h", "", "1:2:3")],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert time_limit_seconds(text) == seconds


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["launcher.slurm.cpus_per_node=null"],
            "cpus_per_node=None: says how many cores of each compute node",
        ),
        (["launcher.slurm.gpus_per_node=-1"], "must not be negative"),
        (["launcher.slurm.gpu_type=h100"], "asks for no GPUs"),
        (
            ["launcher.slurm.gpus_per_node=4", "device=cuda", "launcher.nproc_per_node=8"],
            "gpus_per_node=4: device=cuda takes a GPU",
        ),
        (["launcher.slurm.time=90"], "HH:MM:SS or D-HH:MM:SS"),
        (["launcher.slurm.time=0:02:00"], "comes before the job has begun"),
        (["launcher.slurm.signal_seconds=60"], "must leave time to save: resilience.stop_grace_seconds=120"),
        (["launcher.slurm.mem=4GB"], "number with K, M, G or T"),
        (["launcher.slurm.partition=''"], "is one line of text"),
        (["launcher.slurm.sbatch_args=['--nodes=3']"], "--nodes follows from launcher.nnodes"),
        (["launcher.slurm.sbatch_args=['-t 3']"], "-t follows from launcher.slurm.time"),
        (["launcher.slurm.srun_args=['exclusive']"], "each entry is one option"),
    ],
)
def test_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        script(*overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "launcher=local: `muster submit` writes jobs for slurm and kubernetes"),
        ([*NODES, "--dryrun"], "--dryrun=: is no flag of `muster submit`"),
        ([*NODES, "--output", "x"], "the script is in the run directory"),
        ([*NODES, "optim.lrr=1"], "did you mean optim.lr"),
        ([*NODES, "parallel.ep=3"], "parallel.ep=3: ep is carved from"),
    ],
    ids=lambda value: str(value[-1:]) if isinstance(value, list) else "",
)
def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        submit.main(arguments)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_and_a_machine_without_slurm_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    given = [*NODES, "data=text", "data.path=corpus/*.txt"]
    outcome = submit.main([*given, "--dry-run"])
    assert outcome.code == 0 and outcome.message.startswith("#!/bin/bash\n")
    assert f"run_dir={tmp_path}/runs/exp/a1" in outcome.message
    assert f"data.path={tmp_path}/corpus/*.txt is not seen from here" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="command sbatch, which this machine does not have"):
        submit.main(given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_verify_first_proves_before_anything_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\nls -d "$PWD"/runs/exp/verify-a1/certificate.json && echo "$2" > queued\n')
    sbatch.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    submit.main([*NODES, "launcher.nnodes=1", "train.verify_first=true"])
    assert (tmp_path / "queued").read_text() == f"{tmp_path}/runs/exp/a1/job.sbatch\n"
    certificate = json.loads((tmp_path / "runs" / "exp" / "verify-a1" / "certificate.json").read_text())
    assert certificate["passed"]
    frozen = (tmp_path / "runs" / "exp" / "a1" / "config.yaml").read_text()
    with pytest.raises(
        ConfigError, match=r"run.id=a1: this run was submitted before. Fix: `sbatch .*/job.sbatch`"
    ):
        submit.main([*NODES, "optim.lr=1"])
    assert (tmp_path / "runs" / "exp" / "a1" / "config.yaml").read_text() == frozen


STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_srun_gives_a_rank_its_place() -> None:
    assert slurm_variables(STEP) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20412",
    }
    chosen = slurm_variables({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "9"})
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("10.0.0.1", "9")


def test_others_go_before_slurm() -> None:
    assert slurm_variables({**STEP, "RANK": "0"}) == {}
    # A batch script outside of srun is one process, whatever SLURM_NTASKS says.
    batch = {"SLURM_JOB_ID": "41", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    assert slurm_variables(batch) == {}


def test_unequal_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"same number of processes\. Fix: srun --ntasks-per-node=3"):
        slurm_variables({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4,3"})


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003-007,12]-ib,login1", "gpu003-ib"),
        ("a,b[1,2]", "a"),
        ("r[1-2]n[3-4]", "r1n3"),
    ],
)
def test_first_host(text: str, host: str) -> None:
    assert first_host(text) == host


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
