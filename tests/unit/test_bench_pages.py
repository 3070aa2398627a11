"""`make bench-checkpoint`, `bench-scale`, `bench-before`: what they measure is done by real processes, and told."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import before, checkpoint, scale


def test_every_way_saves_and_loads_the_same() -> None:
    found = checkpoint.run(mib=4, rounds=1)
    assert set(found["lines"]) == set(checkpoint.WAYS)
    state = 4 << 20
    for name, line in found["lines"].items():
        assert line["stall"][0] <= line["total"][0] and line["total"][0] > 0, name
    for name in (checkpoint.DURABLE, checkpoint.FSYNCED, "DCP save", "torch.save, not fsynced"):
        assert state <= found["bytes"][name] < 1.1 * state, name
    assert "| Muster, durable |" in checkpoint.page("head", found, 4, 1)


def test_ranks_of_a_large_world_know_few_groups() -> None:
    line = scale.in_a_fresh_process(512, 257, "dp_replicate 8, ep 8")
    # The world; dense: replicas and shards; sparse: replicas, expert shards and ep.
    assert line["groups"] == [8, 8, 8, 8, 64, 512]
    assert "| 512 | dp_replicate 8, ep 8 | 257 |" in scale.fakes_table([line])


def test_two_ranks_train_as_many_tokens_each_as_two_that_are_apart() -> None:
    found = scale.run_world(2, rounds=1, alone=False)
    assert found["ep"] == 2 and len(found["ms"]) == 1 and found["bytes_a_rank"] > 0
    assert found["exchange_ms"] > 0 and found["weights_ms"] > 0
    apart = scale.run_world(2, rounds=1, alone=True)
    assert len(apart["ms"]) == 1 and "exchange_ms" not in apart
    assert scale.runs_table([apart, found]).count("\n| 2 | 2 |") == 1


def test_a_version_says_what_its_step_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before, "PICTURE", tmp_path / "picture.png")
    one = before.step_of(before.ROOT, steps=1, spin=True)
    assert len(one["ms"]) == 1 and len(one["losses"]) == 3 and one["parts_ms"]["experts"] > 0
    rounds = {"before": [one, one], "after": [one, one]}
    parts = {version: before.parts_of(found) for version, found in rounds.items()}
    assert sum(parts["after"].values()) == pytest.approx(sum(one["parts_ms"].values()))
    before.draw(parts)
    assert (tmp_path / "picture.png").stat().st_size > 1000
    assert "After ÷ before: 1.00 [1.00, 1.00]" in before.page("head", "abc", rounds)
