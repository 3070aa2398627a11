"""A run whose router collapses: it is told, also across a resume; its routes are replayed elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.command import EP2, Workplace
from tests.commands.plugins import entry
from trainer.metrics.report import write_report

COMMON = [
    "optim.schedule=constant",
    "layout.score=sigmoid",
    "layout.balance.coefficient=0",
    "layout.balance.bias_update_rate=1e-9",
    "eval.every=13",
    "health.maps_every=5",
    "health.trace_every=1",
]


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """13 steps, then 11 more, with the thresholds that everyone gets."""
    workplace = Workplace(tmp_path_factory.mktemp("health"))
    workplace.train(
        *EP2, *COMMON, "train.steps=13", "health.dead_steps=16", f"callbacks=[{entry('Collapse')}]"
    )
    assert workplace.events("alarm") == []
    workplace.resume("train.steps=24")
    return workplace


def of_kind(workplace: Workplace, kind: str, run_dir: Path | None = None) -> list[dict[str, Any]]:
    return [record for record in workplace.records("health.jsonl", run_dir) if record["kind"] == kind]


def test_the_alarms_come_when_they_would_have_without_the_break(collapsed: Workplace) -> None:
    found = {event["kind"]: event for event in collapsed.events("alarm")}
    # The window of 20 steps and the 16 idle ones are full only if those before the break count.
    assert set(found) == {"collapse", "dead_experts", "rank_starved"}
    for event in found.values():
        assert (event["step"], event["state"], event["layers"]) == (20, "raised", [1])
    assert sorted(found["collapse"]["evidence"][0]["experts"]) == [0, 1]
    assert found["collapse"]["evidence"][0]["share"] == pytest.approx(1.0)
    assert found["dead_experts"]["evidence"][0]["experts"] == [2, 3, 4, 5, 6, 7]
    assert found["dead_experts"]["since"] == 0
    assert found["rank_starved"]["evidence"][0]["shares"] == [1.0, 0.0]


def test_what_is_written_beside_the_metrics(collapsed: Workplace) -> None:
    records = collapsed.records("metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 25))
    for record in records:
        assert record["moe/rank_max_over_mean"] == 2.0, "all tokens of layer 1 go to rank 0"
        assert record["moe/wait_seconds"] >= 0 and record["moe/unserved_rate"] == 0
        assert 1 / 8 <= record["moe/router_confidence"] <= 1
    windows = of_kind(collapsed, "window")
    assert [record["step"] for record in windows] == [10, 20]
    assert windows[1]["num_effective"][0] > 4 > 2.01 > windows[1]["num_effective"][1]
    assert windows[1]["rank_share"][1] == [1.0, 0.0]
    maps = of_kind(collapsed, "maps")
    assert [(m["split"], m["step"]) for m in maps] == [
        ("valid", 0), ("train", 5), ("train", 10), ("valid", 13), ("train", 15), ("train", 20), ("valid", 24),
    ]  # fmt: skip
    tokens = {"train": 8 * 32, "valid": 16 * 32}
    for record in maps:
        loads = [load for load in record["counts"][1] if load]
        assert loads == [tokens[record["split"]]] * 2
        assert record["pair_counts"][1] == [tokens[record["split"]], *[0] * 27], "experts 0 and 1, always"
        assert sum(sum(load) for load in record["counts"]) == 4 * tokens[record["split"]]


def test_the_report_shows_it(collapsed: Workplace) -> None:
    text = write_report(collapsed.run_dir).read_text()
    for part in (
        "3 of the routing, 3 not over",
        "rank starved",
        "Balance of the ranks",
        "Experts chosen together",
        "Busiest ep rank / mean load",
        "Waiting for other ranks",
    ):
        assert part in text, part


def test_routes_are_replayed_on_other_ranks_in_other_precision(collapsed: Workplace) -> None:
    # One process and no callback: without the trace, layer 1 would not collapse.
    other = ["train.dtype=bf16", "train.micro_batch=2", "train.activation_checkpointing=true"]
    overrides = [*COMMON[:-1], *other, "train.steps=24", "run.id=replayed"]
    collapsed.train(*overrides, f"health.replay={collapsed.run_dir}")
    run_dir = collapsed.run_dir.parent / "replayed"
    records = zip(
        collapsed.records("metrics.jsonl"), collapsed.records("metrics.jsonl", run_dir), strict=True
    )
    for recorded, replayed in records:
        for layer in (0, 1):
            assert recorded[f"moe/L{layer}/load"] == replayed[f"moe/L{layer}/load"]
        assert recorded["loss/train"] != replayed["loss/train"]
        assert recorded["loss/train"] == pytest.approx(replayed["loss/train"], rel=0.02)
    maps = [
        {(m["split"], m["step"]): (m["counts"], m["pair_counts"]) for m in of_kind(collapsed, "maps", where)}
        for where in (collapsed.run_dir, run_dir)
    ]
    assert maps[0] == maps[1]
