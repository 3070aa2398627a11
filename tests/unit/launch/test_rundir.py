"""Run directories: ids, claims, config generations, and what is said about a wrong path."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch_helpers import REPO

from parallel.errors import ConfigError
from trainer.compose import CONF_DIR
from trainer.config import RunConfig
from trainer.environment import differences
from trainer.rundir import RunDirectory, choose_id


def config_at(root: Path, run_id: str | None = None) -> RunConfig:
    config = RunConfig()
    config.run.root, config.run.name, config.run.id = str(root), "t", run_id
    return config


def commit(run: RunDirectory, step: int) -> None:
    folder = run.path / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def test_ids_are_sortable_and_claims_never_shared(tmp_path: Path) -> None:
    assert re.fullmatch(r"\d{8}-\d{6}-[a-z2-9]{2}", choose_id())
    runs = [RunDirectory.create(config_at(tmp_path)) for _ in range(40)]
    assert len({run.path for run in runs}) == 40


def test_an_existing_run_is_resumed_not_overwritten(tmp_path: Path) -> None:
    run = RunDirectory.create(config_at(tmp_path, "a"))
    assert RunDirectory.create(config_at(tmp_path, "a")).path == run.path
    commit(run, 5)
    with pytest.raises(ConfigError, match=re.escape(f"muster resume {run.path}")):
        RunDirectory.create(config_at(tmp_path, "a"))


def test_unwritable_root(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run.root=.*cannot be written"):
        RunDirectory.create(config_at(tmp_path / "file"))


def test_config_generations(tmp_path: Path) -> None:
    run = RunDirectory.create(config_at(tmp_path))
    config = config_at(tmp_path, run.path.name)
    asked = config_at(tmp_path, run.path.name)
    run.freeze(config, asked)
    config.train.steps = 777
    run.freeze(config)
    assert sorted(path.name for path in (run.path / "configs").iterdir()) == [
        "0000.yaml",
        "0001.yaml",
        "asked.yaml",
    ]
    assert run.config().train.steps == 777
    kept = run.asked()
    assert kept is not None and kept.train.steps == asked.train.steps


def test_a_wrong_path_names_the_nearest_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = RunDirectory.create(config_at(tmp_path, name))
        run.freeze(config_at(tmp_path, name))
    with pytest.raises(ConfigError, match=r"does not exist. Fix: did you mean .*/t/a\."):
        RunDirectory.open(tmp_path / "t" / "aa")
    with pytest.raises(ConfigError, match=r"no config.yaml\). Fix: did you mean .*/t/b\."):
        RunDirectory.open(tmp_path / "t")
    with pytest.raises(ConfigError, match="is not a run directory"):
        RunDirectory.open(CONF_DIR)


def test_newest_checkpoint_and_last_step(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.newest_checkpoint() is None and run.last_logged_step() == 0
    commit(run, 100)
    commit(run, 90)
    (tmp_path / "checkpoints" / "step-00000200").mkdir()  # no manifest: not committed
    assert run.newest_checkpoint() == 100
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3')
    assert run.last_logged_step() == 2


def test_finished(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    commit(run, 10)
    log = tmp_path / "events.jsonl"
    log.write_text('{"event": "start", "time": 1, "generation": 0}\n')
    assert not run.is_finished(10)
    log.write_text(log.read_text() + '{"event": "finish", "time": 2}\n')
    assert run.is_finished(10) and not run.is_finished(11)
    assert run.next_generation() == 1


def test_one_agent_at_a_time(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
        "from pathlib import Path\nfrom trainer.rundir import RunDirectory\n"
        f"with RunDirectory(Path({str(tmp_path)!r})).lock(): pass\n"
    )
    with run.lock():
        taken = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is being trained by process" in taken.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_environment_differences() -> None:
    before = {"python": "3.11.2", "threads": 2, "packages": {"torch": "2.11.0"}}
    assert differences(before, {**before, "threads": 1, "packages": {"torch": "2.13.0"}}) == [
        "threads 2 → 1",
        "torch 2.11.0 → 2.13.0",
    ]
    assert differences({}, before) == []
    assert differences(before, before) == []
