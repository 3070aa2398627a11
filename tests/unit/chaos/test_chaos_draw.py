"""Which faults `muster chaos` injects: the table of a cluster, the draw from it, schedules, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from launch.chaos.draw import STEPS_APART, apportion, draw, plan
from launch.chaos.table import Row, read_table
from parallel.errors import ConfigError
from tests.configs import composed
from trainer.config import Machine, RunConfig, resolve
from trainer.faults.kinds import KINDS, POINTS, Fault, read_schedule, write_schedule
from trainer.faults.strikes import STRIKES


def config(*overrides: str) -> RunConfig:
    """Two ranks."""
    two = ["device=cpu", "launcher.nproc_per_node=2", "parallel.ep=2", "checkpoint.every=4"]
    return resolve(composed(*two, *overrides), Machine(num_cpus=2))


@pytest.fixture(scope="module")
def llama3() -> list[Row]:
    return read_table(config("cluster=llama3").cluster)


def test_llama3s_table_is_whole(llama3: list[Row]) -> None:
    assert len(llama3) == 18 and sum(row.count for row in llama3) == 419
    assert Counter(row.component for row in llama3)["Faulty GPU"] == 1
    assert {row.component: row.count for row in llama3}["GPU HBM3 Memory"] == 72
    assert all(row.reason for row in llama3)
    assert len({kind for row in llama3 for kind in row.kinds}) >= 20, "mechanisms, not one for all"


def test_every_kind_can_strike() -> None:
    assert set(STRIKES) == set(KINDS)
    assert len({kind.what for kind in KINDS.values()}) == len(KINDS)
    assert all(kind.points and set(kind.points) <= set(POINTS) for kind in KINDS.values())


def test_all_of_the_table_are_drawn_as_they_are(llama3: list[Row]) -> None:
    pairs = draw(llama3, 0, random.Random(0))
    assert Counter(component for component, _ in pairs) == {row.component: row.count for row in llama3}
    for row in llama3:
        if row.count >= len(row.kinds):
            assert {kind for component, kind in pairs if component == row.component} == set(row.kinds)


@pytest.mark.parametrize("number", [18, 20, 57, 300])
def test_a_part_of_the_table_has_every_component(llama3: list[Row], number: int) -> None:
    pairs = draw(llama3, number, random.Random(3))
    counts = Counter(component for component, _ in pairs)
    assert len(pairs) == number and len(counts) == 18
    assert counts["Faulty GPU"] == max(counts.values())


def test_few_are_drawn_by_weight_and_by_seed(llama3: list[Row]) -> None:
    drawn = [tuple(component for component, _ in draw(llama3, 3, random.Random(seed))) for seed in range(60)]
    assert all(len(set(components)) == 3 for components in drawn)
    often = Counter(component for components in drawn for component in components)
    assert often["Faulty GPU"] > often["SSD"]
    assert drawn[7] == tuple(component for component, _ in draw(llama3, 3, random.Random(7)))


@pytest.mark.parametrize("number", range(3, 40))
def test_shares_sum_to_the_whole_and_follow_the_weights(number: int) -> None:
    shares = apportion({"a": 148, "b": 30, "c": 1}, number, random.Random(0))
    assert sum(shares.values()) == number
    assert shares["a"] >= shares["b"] >= shares["c"] >= 1


def test_faults_are_apart_and_the_same_for_a_seed() -> None:
    asked = ["cluster=llama3", "chaos.faults=24", "train.steps=110"]
    faults = plan(config(*asked))
    steps = [fault.step for fault in faults]
    assert len(faults) == 24 and all(b - a >= STEPS_APART for a, b in itertools.pairwise(steps))
    assert steps[0] > 0 and steps[-1] < 110 - 1
    assert faults == plan(config(*asked))
    assert faults != plan(config(*asked, "chaos.seed=1"))
    assert {fault.rank for fault in faults} == {0, 1}
    assert all(fault.point in KINDS[fault.kind].points for fault in faults)
    waiting = [fault.step for fault in faults if KINDS[fault.kind].waits]
    assert waiting and min(waiting) >= 8, "there are two checkpoints to damage one of"
    assert max(waiting) < 110 - 4, "and one more to come"


def test_a_nodes_faults_are_stood_in_for_and_say_so() -> None:
    (fault,) = plan(config("chaos.kinds=[node-lost]", "train.steps=20"))
    assert (fault.kind, fault.instead_of) == ("kill-all", "node-lost")


def test_nodes_that_do_not_come_back_take_their_ranks_with_them(tmp_path: Path) -> None:
    kinds = ",".join(["kill", "node-lost"] * 4)
    four = config(
        *("chaos.nodes=4", "launcher.nnodes=4", "launcher.master_addr=a", "launcher.nproc_per_node=1"),
        *(f"chaos.kinds=[{kinds}]", "chaos.nodes_gone=2", "train.steps=60"),
    )
    draws = [plan(replace(four, chaos=replace(four.chaos, seed=seed))) for seed in range(40)]
    assert [fault.kind for fault in draws[0][1::2]] == ["node-gone", "node-gone", "node-lost", "node-lost"]
    ranks = [{faults[index].rank for faults in draws} for index in range(8)]
    assert ranks == [set(range(world)) for world in (4, 4, 3, 3, 2, 2, 2, 2)]
    path = tmp_path / "faults.jsonl"
    path.write_text('{"step": 3, "rank": 0, "kind": "node-gone"}\n{"step": 7, "rank": 3, "kind": "kill"}\n')
    four.chaos.schedule, four.chaos.nodes_gone = str(path), 0
    with pytest.raises(ConfigError, match=r"rank 3 at step 7: 3 rank\(s\) are left by then"):
        plan(four)


def test_schedules_are_replayed_exactly(tmp_path: Path) -> None:
    path = tmp_path / "faults.jsonl"
    path.write_text('{"step": 7, "rank": 1, "kind": "kill"}\n\n{"step": 3, "rank": 0, "kind": "disk-full"}\n')
    faults = plan(config(f"chaos.schedule={path}", "train.steps=8"))
    assert faults == [Fault(3, 0, "disk-full", "save"), Fault(7, 1, "kill", "batch")]
    write_schedule(faults, path)
    assert read_schedule(path) == faults


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "faults.jsonl:1: is not a JSON object"),
        ({"step": 1, "rank": 0}, "has no kind"),
        ({"step": 1, "rank": 0, "kind": "kil"}, "there is no kind of fault 'kil'. Fix: did you mean kill"),
        ({"step": 1, "rank": 0, "kind": "kill", "when": 3}, "has a field when"),
        ({"step": 1.5, "rank": 0, "kind": "kill"}, "step is no whole number"),
        ({"step": 1, "rank": 2, "kind": "kill"}, "rank is 2; the run has ranks 0 to 1"),
        ({"step": 20, "rank": 0, "kind": "kill"}, "step is 20; the run has steps 0 to 19"),
        (
            {"step": 1, "rank": 0, "kind": "kill", "point": "save"},
            "kill cannot strike at save. Fix: one of batch",
        ),
    ],
)
def test_what_is_wrong_with_a_schedule(tmp_path: Path, line: object, said: str) -> None:
    path = tmp_path / "faults.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(ConfigError) as caught:
        plan(config(f"chaos.schedule={path}", "train.steps=20"))
    assert said in str(caught.value) and caught.value.field == "chaos.schedule"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "cluster=none: has no failure table to draw from. Fix: cluster=llama3"),
        (["cluster=llama3", "chaos.faults=500"], "chaos.faults=500: the table has 419 interruptions"),
        (["cluster=llama3"], "train.steps=100: 419 faults, 4 steps apart, take at least 1680 steps"),
        (["chaos.kinds=[kill,segfalt]"], "chaos.kinds=segfalt: there is no kind of fault"),
        (["chaos.schedule=/gone"], "chaos.schedule=/gone: cannot be read"),
        (
            ["cluster=llama3", "chaos.faults=20", "checkpoint.every=50"],
            "checkpoint.every=50: ",
        ),
        (
            ["chaos.kinds=[kill]", "chaos.nodes_gone=1"],
            "chaos.nodes_gone=1: 0 node(s) are lost by these faults",
        ),
        (
            ["chaos.nodes=2", "chaos.kinds=[node-lost,node-lost]", "chaos.nodes_gone=2"],
            "chaos.nodes=2: 2 of 2 nodes do not come back: none is left. Fix: chaos.nodes=3",
        ),
        (["cluster=llama3", "cluster.faults.CPU.kinds.kil=1"], "there is no kind of fault 'kil'"),
        (["cluster=llama3", "cluster.faults.CPU.kinds.kill=0"], "a weight is above 0"),
        (["cluster=llama3", "cluster.interruptions=/gone.csv"], "/gone.csv: cannot be read"),
    ],
)
def test_what_cannot_be_drawn(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(config("train.steps=100", *overrides))
    assert said in str(caught.value)


def test_a_table_and_its_faults_name_the_same_components() -> None:
    cluster = config("cluster=llama3", "train.steps=1").cluster
    cluster.faults["Cat"] = cluster.faults["CPU"]
    with pytest.raises(
        ConfigError, match=r"cluster\.faults=Cat: is no component of llama3_interruptions\.csv"
    ):
        read_table(cluster)
    del cluster.faults["CPU"], cluster.faults["Cat"]
    with pytest.raises(ConfigError, match="says nothing of CPU, which"):
        read_table(cluster)
