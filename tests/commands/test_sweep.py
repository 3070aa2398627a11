"""`muster train -m`: each point its own run; bad points are listed and stop no other."""

from __future__ import annotations

import json

import pytest

from tests.command import Workplace
from tests.commands.watch import assert_nothing_left
from trainer.compose import load_frozen


def records(workplace: Workplace) -> dict[str, dict[str, str]]:
    """The sweep's records, by overrides."""
    found = sorted(workplace.run_dir.parent.glob("*/points/*.json"))
    points = [json.loads(path.read_text()) for path in found]
    return {" ".join(point["overrides"]): point for point in points}


def test_every_choice_is_a_run_of_one_group(workplace: Workplace) -> None:
    sweep = ["layout=dense,mixtral", "optim.lr=1e-3", "train.steps=2"]
    output = workplace.train("-m", *sweep, "run.id=null")
    points = records(workplace)
    assert sorted(points) == ["layout=dense", "layout=mixtral"], "what all points have is not said with each"
    for overrides, point in points.items():
        assert point["status"] == "done"
        assert f"point {point['number']}: {overrides}" in output
    table = output[output.index("sweep ") :]  # its columns may fold, so only short words are looked for
    assert table.count("done") == 2
    configs = [load_frozen(path) for path in workplace.run_dir.parent.glob("*/config.yaml")]
    assert len(configs) == 2
    assert len({config.run.group for config in configs}) == 1 and configs[0].run.group
    assert sorted((c.layout.name, c.optim.lr) for c in configs) == [("dense", 0.001), ("mixtral", 0.001)]


@pytest.mark.long
def test_bad_points_are_listed_and_stop_no_other(workplace: Workplace) -> None:
    bomb = '[{target: "tests.chaos.plugins:KillAlways"}]'
    output = workplace.train(
        "-m",
        "model.num_kv_heads=3,2",
        f"callbacks={bomb},[]",
        "train.steps=2",
        "resilience.max_restarts=0",
        expect=1,
    )
    points = list(records(workplace).values())
    assert [point["status"] for point in points] == ["invalid", "invalid", "failed", "done"]
    assert "model.num_kv_heads=3: must divide model.num_heads = 4" in points[0]["message"]
    assert "SIGKILL" in points[2]["message"]
    table = output[output.index("sweep ") :]
    assert [table.count(word) for word in ("invalid", "failed", "done")] == [2, 1, 1]
    assert "must divide" in table
    assert "Traceback" not in output
    assert_nothing_left(workplace)
