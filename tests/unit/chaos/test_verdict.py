"""The verdict on a fault, from the records that a run leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.chaos.verdict import TOLERANCE, judge
from trainer.faults.kinds import Fault


def found(folder: Path, events: Sequence[Mapping[str, Any]], times: Mapping[int, float]) -> dict[str, Any]:
    """The verdict on a fault that struck at time 100 with 10 steps done, of a run that came to no end."""
    for name in ("run", "reference", "marks"):
        (folder / name).mkdir()
    mark = {"time": 100.0, "step": 10, "rank": 0, "host": "h", "generation": 0}
    (folder / "marks" / "0000.json").write_text(json.dumps(mark) + "\n")
    steps = [{"step": step, "time": time, "loss/train": 1.0} for step, time in times.items()]
    for name, records in (("events", events), ("metrics", steps)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "run" / f"{name}.jsonl").write_text(lines)
    fault = Fault(10, 0, "kill", "forward")
    verdict = judge([fault], folder / "marks", folder / "run", folder / "reference", finished=False)
    return verdict["faults"][0]


def failure(time: float, step: int, kind: str = "failure") -> dict[str, Any]:
    return {"event": kind, "time": time, "step": step}


@pytest.mark.parametrize("kind", ["failure", "restart", "stop"])
def test_a_step_that_ended_before_the_fault_was_noticed_is_no_recovery(tmp_path: Path, kind: str) -> None:
    facts = found(tmp_path, [failure(108.0, 11, kind)], {10: 99.0, 11: 107.0, 12: 112.0, 13: 113.0})
    assert (facts["detected_seconds"], facts["recovery_seconds"], facts["survived"]) == (8.0, 12.0, True)


def test_a_step_that_only_repeats_what_was_done_is_no_recovery(tmp_path: Path) -> None:
    facts = found(tmp_path, [failure(101.0, 10)], {8: 90.0, 9: 103.0, 10: 104.0, 11: 105.0})
    assert (facts["recovery_seconds"], facts["survived"]) == (5.0, True)


def test_a_run_that_goes_no_further_has_not_survived(tmp_path: Path) -> None:
    facts = found(tmp_path, [failure(108.0, 11)], {9: 109.0, 10: 110.0, 11: 107.0})
    assert (facts["recovery_seconds"], facts["survived"]) == (None, False)


def test_what_nobody_noticed_has_no_recovery_time(tmp_path: Path) -> None:
    facts = found(tmp_path, [], {10: 99.0, 11: 101.0})
    assert (facts["detected"], facts["recovery_seconds"], facts["survived"]) == (None, None, True)


@pytest.mark.parametrize(
    ("kind", "losses", "equal"),
    [
        ("kill", {1: 2.0, 2: 2.0 + 1e-9}, False),
        ("node-gone", {1: 2.0, 2: 2.0 + 1e-9}, True),
        ("node-gone", {1: 2.0, 2: 2.0 + 5 * TOLERANCE}, False),
        ("node-gone", {1: 2.0, 2: float("nan")}, False),
        ("node-gone", {1: 2.0}, False),
    ],
)
def test_only_a_run_that_lost_nodes_for_good_may_differ_and_only_by_rounding(
    tmp_path: Path, kind: str, losses: dict[int, float], equal: bool
) -> None:
    (tmp_path / "marks").mkdir()
    for name, curve in (("run", losses), ("reference", {1: 2.0, 2: 2.0})):
        (tmp_path / name).mkdir()
        steps = [{"step": step, "time": 100.0 + step, "loss/train": loss} for step, loss in curve.items()]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        (tmp_path / name / "events.jsonl").write_text(
            json.dumps({"event": "finish", "time": 103.0, "step": 2, "goodput": 1.0, "weights_digest": name})
            + "\n"
        )
    faults = [Fault(1, 0, kind, "forward")]
    verdict = judge(faults, tmp_path / "marks", tmp_path / "run", tmp_path / "reference", finished=True)
    assert (verdict["equal"], verdict["bit_identical"]) == (equal, False)
    assert (verdict["first_difference"] is None) == equal
