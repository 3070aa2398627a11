"""`muster resume`: longer, on other ranks, as a branch; and starting new runs from old ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.command import CALM, Workplace
from tests.commands.watch import assert_one_error, checkpoints_of, digest_of_checkpoint
from trainer.checkpoint.resume import open_checkpoint

HALF, WHOLE = "train.steps=6", "train.steps=12"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The first 6 of the calm run's 12 steps."""
    workplace = Workplace(tmp_path_factory.mktemp("resume"))
    workplace.train(*CALM, HALF, "checkpoint.every=3")
    return workplace


def copy(workplace: Workplace, name: str) -> Path:
    """A copy of the half-way run."""
    target = workplace.run_dir.parent / name
    shutil.copytree(workplace.run_dir, target, symlinks=True)
    return target


def test_longer_ends_as_if_never_stopped(trained: Workplace, calm: Workplace) -> None:
    run_dir = copy(trained, "longer")
    trained.resume(WHOLE, run_dir=run_dir)
    assert trained.digest(run_dir) == calm.digest()
    assert trained.losses(run_dir) == calm.losses()
    assert len(list((run_dir / "configs").glob("0*.yaml"))) == 2, "each a numbered generation of the config"
    output = trained.resume(run_dir=run_dir)
    assert "This run is finished: its checkpoint is at step 12" in output


def test_other_ranks_and_back_compute_the_same(trained: Workplace, calm: Workplace) -> None:
    run_dir = copy(trained, "elsewhere")
    trained.resume("launcher.nproc_per_node=1", "parallel.ep=1", "train.steps=9", run_dir=run_dir)
    trained.resume("launcher.nproc_per_node=2", "parallel.ep=2", WHOLE, run_dir=run_dir)
    starts = trained.events("start", run_dir)
    assert [start["world_size"] for start in starts] == [2, 1, 2]
    assert [event["step"] for event in trained.events("resume", run_dir)] == [6, 9]
    assert trained.losses(run_dir) == pytest.approx(calm.losses(), rel=1e-5)


@pytest.mark.long
def test_a_branch_leaves_the_old_run_alone(trained: Workplace) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.run_dir.rglob("*") if path.is_file()}
    output = trained.resume("run.id=branch", "optim.lr=1e-2", "train.steps=8")
    branch = trained.run_dir.parent / "branch"
    assert f"Branch of {trained.run_dir}: {branch}" in output
    assert [event["step"] for event in trained.events("resume", branch)] == [6]
    assert sorted(trained.losses(branch)) == [7, 8]
    after = {path: path.stat().st_mtime_ns for path in trained.run_dir.rglob("*") if path.is_file()}
    assert after == before


def test_a_new_run_goes_on_from_another(trained: Workplace, calm: Workplace) -> None:
    load = f"checkpoint.load_from={trained.run_dir}"
    trained.train(*CALM, load, "run.id=loaded")
    assert trained.digest(trained.run_dir.parent / "loaded") == calm.digest()


@pytest.mark.long
def test_weights_alone_begin_a_run_on_other_data(trained: Workplace) -> None:
    other = trained.path / "other"
    other.mkdir()
    for path in (trained.path / "corpus").iterdir():
        (other / path.name).write_text(path.read_text().swapcase())
    trained.train(
        "optim.lr=0",  # so that the weights at the end are those that were loaded
        "train.steps=2",
        f"data.path={other}",
        f"data.tokenizer.path={trained.run_dir / 'tokenizer.json'}",
        f"checkpoint.load_from={trained.run_dir}",
        "checkpoint.load_weights_only=true",
        "run.id=weights",
    )
    run_dir = trained.run_dir.parent / "weights"
    assert sorted(trained.losses(run_dir)) == [1, 2]
    assert trained.digest(run_dir) == digest_of_checkpoint(trained.run_dir, 6)
    state = open_checkpoint(run_dir).trainer
    assert (state["step"], state["tokens"], state["loader"]["next_sample"]) == (2, 512, 16)


def test_what_cannot_be_resumed_is_said(trained: Workplace) -> None:
    output = trained.resume(run_dir=trained.path / "corpus", expect=2)
    assert_one_error(output, "RUN_DIR=", "is not a run directory (it holds no config.yaml)")
    output = trained.resume("layout=dense", expect=2)
    assert_one_error(output, "layout=dense", "a run keeps the group files it was composed from")
    output = trained.resume("model.dim=64", WHOLE, run_dir=copy(trained, "wider"), expect=2)
    assert_one_error(output, "tensor", "has shape", "use the model, layout and optim settings")
    assert checkpoints_of(trained.run_dir) == ["step-00000003", "step-00000006"]


@pytest.mark.long
@pytest.mark.long
def test_a_balance_loss_by_forward_pass_does_not_go_on_under_another_split(workplace: Workplace) -> None:
    workplace.train("layout.balance.scope=micro", "train.steps=2", "train.micro_batch=4")
    output = workplace.resume("train.steps=3", "train.micro_batch=2", expect=2)
    assert_one_error(output, "layout.balance.scope=micro", "1 data-parallel rank(s) with train.micro_batch=4")
    assert "has 1 with 2, which would train another objective" in output
