"""`muster resume`: blanks are filled anew, finished runs are left alone, branches begin from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import resume
from launch.resume import BLANKS, refill
from parallel.errors import ConfigError
from trainer.compose import apply_overrides, compose
from trainer.config import Device, Machine, RunConfig, resolve
from trainer.overrides import schema_types
from trainer.rules import validate
from trainer.rundir import RunDirectory

MACHINE = Machine(num_cpus=8)


def again(asked: list[str], overrides: list[str], keep_asked: bool = True) -> RunConfig:
    """The config of a run after a resume with these overrides, on a machine with 8 cores."""
    written = compose(asked)
    frozen = resolve(written, MACHINE)
    changed = {override.partition("=")[0] for override in overrides}
    config = refill(apply_overrides(frozen, overrides), written if keep_asked else None, changed)
    config = resolve(config, MACHINE)
    validate(config)
    return config


@pytest.mark.parametrize("keep_asked", [True, False])
def test_another_layout_fills_the_world_again(keep_asked: bool) -> None:
    config = again(
        ["launcher.nproc_per_node=4", "parallel.ep=4"],
        ["launcher.nproc_per_node=1", "parallel.ep=1"],
        keep_asked,
    )
    assert (config.parallel.dp_shard, config.train.micro_batch, config.train.num_threads) == (1, 8, 8)
    config = again(["launcher.nproc_per_node=4"], ["parallel.dp_replicate=2"], keep_asked)
    assert (config.parallel.dp_shard, config.train.micro_batch, config.train.num_threads) == (2, 2, 2)


def test_what_the_user_had_set_stays() -> None:
    config = again(
        ["launcher.nproc_per_node=2", "train.micro_batch=1", "train.num_threads=3", "device=cpu"],
        ["launcher.nproc_per_node=4"],
    )
    assert (config.train.micro_batch, config.train.num_threads, config.device) == (1, 3, Device.cpu)
    config = again(["launcher.nproc_per_node=2"], ["launcher.nproc_per_node=4", "train.micro_batch=1"])
    assert config.train.micro_batch == 1


def test_nothing_is_refilled_without_a_reason() -> None:
    frozen = resolve(compose(["launcher.nproc_per_node=2"]), MACHINE)
    assert refill(frozen, None, {"train.steps", "optim.lr"}) == frozen


def test_blanks_name_fields_of_the_schema() -> None:
    named = set(BLANKS) | {source for sources in BLANKS.values() for source in sources}
    assert named <= schema_types().keys()


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    written = compose([f"run.root={tmp_path}", "run.name=t", "run.id=a", "train.steps=10"])
    config = resolve(written, MACHINE)
    run = RunDirectory.create(config)
    run.freeze(config, written)
    folder = run.path / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (run.path / "events.jsonl").write_text('{"event": "finish", "time": 2, "step": 10}\n')
    return run


def test_a_finished_run_has_nothing_to_do(finished: RunDirectory) -> None:
    outcome = resume.main([str(finished.path)])
    assert outcome.code == 0
    assert "This run is finished: its checkpoint is at step 10" in outcome.message
    assert "train.steps=20" in outcome.message
    assert not (finished.path / "configs" / "0001.yaml").exists()


def test_resume_mistakes_leave_the_run_alone(finished: RunDirectory) -> None:
    before = finished.config_path.read_text()
    for override, message in (
        ("layout=dense", "keeps the group files"),
        ("parallel.ep=3", "parallel.ep=3: ep is carved from"),
        ("optim.lrr=1", "did you mean optim.lr"),
        ("run.id=a", "holds a run with checkpoints"),
    ):
        with pytest.raises(ConfigError, match=message):
            resume.main([str(finished.path), "train.steps=20", override])
    assert finished.config_path.read_text() == before
    assert len(list((finished.path / "configs").glob("0*.yaml"))) == 1


def test_a_moved_run_is_where_it_is(finished: RunDirectory, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "n" / "b"
    moved.parent.mkdir(parents=True)
    finished.path.rename(moved)
    config = resume._at_its_place(RunDirectory.open(moved))
    assert (config.run.root, config.run.name, config.run.id) == (str(tmp_path / "elsewhere"), "n", "b")
