"""`make bench-layouts`: what it reads from a run, and what it does not measure again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import layouts as bench
from trainer.metrics.jsonl import encode


def write_run(folder: Path) -> Path:
    """A run of 30 steps: ten slow ones with dead experts, then twenty without."""
    records = []
    for step in range(1, 31):
        early = step <= 10
        records.append(
            {
                "step": step,
                "tokens": step * 2048,
                "time": 0.0,
                "perf/tokens_per_second": 100.0 if early else 1000.0 + step,
                "moe/max_over_mean": 8.0 if early else 1.5,
                "moe/dead_experts": 7 if early else step % 2,
                "moe/drop_rate": 0.5 if early else 0.25,
                "moe/router_entropy": 2.0,
            }
        )
    start = {"event": "start", "step": 0, "num_parameters": 15e6, "num_active_parameters": 5e6, "steps": 30}
    finish = {"event": "finish", "step": 30, "seconds": 60.0, "loss_valid": 4.5, "unigram_loss": 6.5}
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes(b"".join(encode(record) for record in records))
    (folder / "events.jsonl").write_bytes(encode(start) + encode(finish))
    return folder


def test_a_row_is_the_end_of_a_run_and_its_median_speed(tmp_path: Path) -> None:
    row = bench.measured(write_run(tmp_path / "run"))
    assert (row["loss_valid"], row["below_unigram"], row["steps"]) == (4.5, 2.0, 30)
    assert (row["max_over_mean"], row["dead_experts"], row["drop_rate"]) == (1.5, 0.5, 0.25)
    assert row["tokens_per_second"] == 1015.5
    assert row["tokens"] == 30 * 2048


def test_what_was_measured_here_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = bench.this_machine()
    key = bench.key_of(bench.overrides_of("switch", 30), machine)
    rows = {"switch": {"key": key, "date": "2026-01-01", **bench.measured(write_run(tmp_path / "run"))}}
    bench.write(tmp_path, rows, 30, ' ARGS="--steps 30"')
    call = ["--layouts", "switch", "--steps", "30", "--out", str(tmp_path), "--runs", str(tmp_path / "runs")]
    assert bench.main(call) == 0
    page = capsys.readouterr().out
    assert "| `switch` | 15.0 M | 5.0 M | 4.500 | 2.000 | 1,016 | 1.50 | 25.0% | 0.5 | 2.00 |" in page
    assert f"{machine['nproc']} cores" in page and '`make bench-layouts ARGS="--steps 30"`' in page
    assert bench.main([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert not (tmp_path / "runs").exists(), "it trained"
    assert bench.stored(tmp_path / "layouts.json", machine) == rows
    assert bench.stored(tmp_path / "layouts.json", {**machine, "cpu": "another"}) == {}


def test_a_key_changes_with_the_config_and_the_machine() -> None:
    machine = bench.this_machine()
    key = bench.key_of(bench.overrides_of("switch", 30), machine)
    assert key == bench.key_of(bench.overrides_of("switch", 30), machine)
    assert key != bench.key_of(bench.overrides_of("switch", 31), machine)
    assert key != bench.key_of(bench.overrides_of("gshard", 30), machine)
    assert key != bench.key_of(bench.overrides_of("switch", 30), {**machine, "nproc": -1})


def test_an_unknown_layout_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--layouts", "swich"])
    assert "no such layout: swich" in capsys.readouterr().err
