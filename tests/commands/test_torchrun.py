"""The worker without `muster`: torchrun with overrides, its restarts, and a single process."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.command import CALM, SMALL, Workplace
from tests.commands.plugins import entry
from tests.commands.watch import assert_nothing_left

TORCHRUN = str(Path(sys.executable).parent / "torchrun")
RENDEZVOUS = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--nproc-per-node=2"]
RUN = [*(override for override in CALM if not override.startswith("launcher.")), "checkpoint.every=4"]


def torchrun(workplace: Workplace, options: list[str], *overrides: str, expect: int = 0) -> str:
    """torchrun of the small model on two ranks."""
    small = [override for override in SMALL if not override.startswith("run.id=")]
    data = f"data.path={workplace.path / 'corpus'}"
    return workplace.run(TORCHRUN, *options, "-m", "trainer", *small, data, *RUN, *overrides, expect=expect)


def test_same_weights_as_muster_and_the_same_id_goes_on(workplace: Workplace, calm: Workplace) -> None:
    standalone = ["--standalone", "--nproc-per-node=2"]
    torchrun(workplace, standalone, "run.id=a", "train.steps=6")
    torchrun(workplace, standalone, "run.id=a")
    assert [event["step"] for event in workplace.events("resume")] == [6]
    assert workplace.digest() == calm.digest()
    assert workplace.losses() == calm.losses()
    assert not (workplace.run_dir / "wandb").exists(), "logger.wandb.mode=disabled"
    assert_nothing_left(workplace)


def test_without_an_id_the_field_is_named(workplace: Workplace) -> None:
    output = torchrun(workplace, RENDEZVOUS, "train.steps=2", expect=1)
    said = [line for line in output.splitlines() if line.startswith("muster: ")]
    assert len(said) == 1 and "run.id=None" in said[0] and "Fix: run.id=my-run" in said[0], output
    assert not (workplace.path / "runs").exists()
    assert_nothing_left(workplace)


def test_a_rendezvous_id_names_the_run_and_a_killed_rank_comes_back(
    workplace: Workplace, calm: Workplace
) -> None:
    options = [*RENDEZVOUS, "--rdzv-id=job7", "--max-restarts=2"]
    killed = {"folder": str(workplace.path / "marks"), "at": [[6, 1], [10, 0]], "every": 4}
    killer = entry("tests.chaos.plugins:KillAt", **killed)
    torchrun(workplace, options, f"callbacks=[{killer}]")
    run_dir = workplace.run_dir.parent / "job7"
    assert len(list((workplace.path / "marks").iterdir())) == 2
    assert [event["step"] for event in workplace.events("resume", run_dir)] == [4, 8]
    assert workplace.digest(run_dir) == calm.digest()
    assert workplace.losses(run_dir) == calm.losses()
    assert_nothing_left(workplace)


def test_one_process_without_any_launcher(workplace: Workplace) -> None:
    data = f"data.path={workplace.path / 'corpus'}"
    command = [sys.executable, "-m", "trainer", *SMALL, data]
    output = workplace.run(*command, "train.steps=2")
    assert "step 2/2" in output
    assert sorted(workplace.losses()) == [1, 2]
    output = workplace.run(sys.executable, "-m", "trainer", str(workplace.run_dir / "config.yaml"))
    assert workplace.events("start")[-1]["generation"] == 1, "a frozen config is as good as overrides"
    output = workplace.run(*command, "optim.lrr=3", expect=2)
    assert output == "muster: optim.lrr=3: there is no such key. Fix: did you mean optim.lr=3.\n"
