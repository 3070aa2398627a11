"""Sweeps: choices are checked first, points never stop each other, the table tells what became of them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from launch import sweep
from launch.outcome import Outcome
from launch.sweep import Sweep
from launch.train import _through_hydra
from parallel.errors import ConfigError
from trainer.config import RunConfig


def train(config: RunConfig) -> Outcome:
    """A stand-in for the hour of training between a config and its metrics; the rest is real."""
    if config.train.seed == 13:
        raise ConfigError("train.seed", 13, "is unlucky", "train.seed=12")
    if config.train.seed == 14:
        return Outcome(70, "Gave up.")
    if config.train.seed == 15:
        return Outcome(75, "Stopped and saved.")
    run_dir = Path(config.run.root) / config.run.name / str(config.run.id)
    run_dir.mkdir(parents=True)
    record = {
        "step": 1,
        "tokens": 8,
        "time": 0.0,
        "loss/train": config.optim.lr,
        "perf/tokens_per_second": 10.0,
    }
    lines = [record, {**record, "step": 2, "loss/valid": config.optim.lr / 2}, {**record, "step": 3}]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config.optim.lr == 4e-3:  # the evaluation at the end is no step's
        (run_dir / "events.jsonl").write_text('{"event": "finish", "time": 1, "loss_valid": 0.25}\n')
    return Outcome(0)


def run_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> tuple[Sweep, str, int]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.train.train", train)
    plan = sweep.check([f"run.root={tmp_path}/runs", *overrides], None)
    stopped = False
    try:
        _through_hydra([*plan.overrides, "-m"], plan)
    except SystemExit:
        stopped = True
    output = io.StringIO()
    outcome = plan.finish(Console(file=output, width=200), interrupted=stopped)
    return plan, output.getvalue(), outcome.code


def test_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, table, code = run_sweep(tmp_path, monkeypatch, "layout=dense,mixtral", "optim.lr=1e-3,4e-3")
    assert code == 0
    points = plan.points()
    assert [point.overrides for point in points] == [
        [f"layout={layout}", f"optim.lr={lr}"] for layout in ("dense", "mixtral") for lr in ("0.001", "0.004")
    ]
    assert [Path(point.run_dir).name for point in points] == [
        f"{plan.name}-{number:02d}" for number in range(4)
    ]
    assert [(point.train_loss, point.valid_loss) for point in points[:2]] == [(0.001, 0.0005), (0.004, 0.25)]
    assert points[1].objective == 0.25
    assert "layout=mixtral optim.lr=0.004" in table and "0.2500" in table
    assert not [path for path in tmp_path.iterdir() if path.name != "runs"]


def test_bad_points_stop_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, table, code = run_sweep(tmp_path, monkeypatch, "train.seed=13,14,1")
    assert [point.status for point in plan.points()] == ["invalid", "failed", "done"] and code == 1
    assert plan.points()[0].objective == plan.points()[1].objective == math.inf
    assert "is unlucky" in table


def test_all_invalid_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_sweep(tmp_path, monkeypatch, "train.seed=13", "optim.lr=1,2")[2] == 2


def test_a_stop_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _, code = run_sweep(tmp_path, monkeypatch, "train.seed=1,15,2")
    assert [point.status for point in plan.points()] == ["done", "stopped"] and code == 75


def test_a_named_sweep_runs_its_params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _, code = run_sweep(tmp_path, monkeypatch, "sweep=quick")
    assert len(plan.points()) == 4 and code == 0
    assert plan.folder.parent == tmp_path / "runs" / "sweep-quick"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["layout=dense,mixtrl"], "layout=mixtrl: must be one of"),
        (["optim.lr=1,2", "train.steps=3,x"], "train.steps=x: must be a whole number"),
        (["train.steps=choice(3,x)"], "train.steps=x: must be a whole number"),
        (["optim.lrr=range(1,3)"], "did you mean optim.lr"),
        (["sweep=quick", "layout=dense,mixtrl"], "layout=mixtrl: must be one of"),
        (["run.root=/proc/none", "optim.lr=1,2"], "cannot be made"),
    ],
)
def test_choices_are_checked_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        sweep.check(overrides, None)
    assert list(tmp_path.iterdir()) == []


def test_the_group_is_the_sweep(tmp_path: Path) -> None:
    seen: list[RunConfig] = []

    def keep(config: RunConfig) -> Outcome:
        seen.append(config)
        return Outcome(70, "no")

    plan = Sweep("20260101-000000-ab", tmp_path)
    for group, run_id in ((None, None), ("mine", "me")):
        config = RunConfig()
        config.run.root, config.run.group, config.run.id = str(tmp_path), group, run_id
        assert plan.run_point(config, 3, [], keep) == math.inf
    assert [(config.run.group, config.run.id) for config in seen] == [
        ("20260101-000000-ab", "20260101-000000-ab-03"),
        ("mine", "me-03"),
    ]
