"""`make bench-layer`: everyone it measures computes the same layer, and who does not is called WRONG."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import layer as bench
from bench import layer_peers as peers
from bench import layer_work as work
from bench.layer_contestant import Contestant, Muster
from bench.layer_page import Block, Row, page, table
from bench.live import LiveLog
from bench.paired import in_turn

TINY = work.Shape("tiny", tokens=64, dim=16, ffn_dim=24, num_experts=8, top_k=2, of="mixtral")
SHAPES = [TINY, replace(TINY, top_k=4, of="olmoe"), replace(TINY, top_k=1, of="qwen3_moe")]
RIGHT = ["Muster", "transformers, grouped_mm", "transformers, eager", "DeepSpeed MoE, no drop"]
RIGHT += ["DeepSpeed AutoEP", "loop over experts"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Beside other tests, threads that wait for each other make layers as small as these fifty times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"k{shape.top_k}")
def test_all_agree_with_fp64_whatever_the_routing(shape: work.Shape, dtype: torch.dtype) -> None:
    builds = peers.contestants("cpu", dtype)
    for routing in ("balanced", "zipf"):
        block = bench.measure(shape, dtype, routing, rounds=1, device="cpu", builds=builds)
        assert {row.name: row.note for row in block.rows if row.name in RIGHT} == dict.fromkeys(RIGHT, "")
        for row in block.rows:
            assert len(row.ms) == 1, f"{row.name}: {row.note}"
    # With a capacity an uneven routing loses rows.
    dropped = block.row("DeepSpeed MoE, capacity 1.25")
    assert dropped.note.startswith("WRONG: ") and dropped.wrong_rows and dropped.wrong_rows > 0.02


class Forgets(Muster):
    """Multiplies no answer by its combine weight."""

    def forward(self, given: work.Work) -> torch.Tensor:
        self.leaves[1] = torch.ones_like(self.leaves[1]).requires_grad_()
        return super().forward(given)


def breaks(shape: work.Shape, weights: work.Weights) -> Contestant:
    raise ValueError("no such kernel")


def test_the_wrong_the_broken_and_the_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    builds = peers.contestants("cpu", torch.float32)
    floor = peers.FLOORS[torch.float32]
    chosen = {"Muster": builds["Muster"], "forgets": Forgets, "breaks": breaks, floor: builds[floor]}
    chosen["absent"] = peers._unwritten("no_such_package")
    block = bench.measure(TINY, torch.float32, "balanced", rounds=2, device="cpu", builds=chosen)
    assert block.row("forgets").note.startswith("WRONG: ") and len(block.row("forgets").ms) == 2
    assert block.row("breaks").note == "failed: ValueError: no such kernel"
    assert block.row("absent").note.startswith("not installed (")
    text = table(block)
    assert (
        "| breaks | failed: ValueError: no such kernel |" in text and "outputs of 100% of the tokens" in text
    )
    assert block.best_peer() is None, "a wrong one is no peer to be ahead of"
    with pytest.raises(ValueError, match="no such kernel"):
        bench.measure(TINY, torch.float32, "balanced", 1, "cpu", {**chosen, "Muster": breaks})


@pytest.mark.parametrize("part", ["y_TD", "dx_TD", "dweight_TK"])
def test_one_wrong_value_is_an_error_of_its_size(part: str) -> None:
    given = work.make_work(TINY, torch.float32, "balanced", 0, "cpu")
    right = work.truth(given, work.make_weights(TINY, torch.float32, "cpu"))
    assert work.error(right, right)[0] == 0
    spoilt = getattr(right, part).clone()
    spoilt[3, 0] += 0.5 * spoilt.abs().max()
    assert work.error(replace(right, **{part: spoilt}), right)[0] == pytest.approx(0.5)
    spoilt[3, 0] = torch.nan
    assert work.error(replace(right, **{part: spoilt}), right)[0] == float("inf")


@pytest.mark.parametrize(
    "shape", [s for shapes in work.SHAPES.values() for s in shapes], ids=lambda s: s.name
)
def test_routings_are_as_skewed_as_they_say(shape: work.Shape) -> None:
    shape = replace(shape, tokens=min(shape.tokens, 4096))
    g = torch.Generator().manual_seed(0)
    for routing, wanted, slack in (("balanced", 1.0, 0.0), ("zipf", work.SKEW, 0.12)):
        expert_TK = work.route(shape, routing, 0, g)
        assert work.max_over_mean(expert_TK, shape.num_experts) == pytest.approx(wanted, rel=slack)
        assert all(len(set(row)) == shape.top_k for row in expert_TK[:200].tolist()), "an expert twice"
    weight_TK = work.combine_weights(shape, g)
    assert torch.equal(weight_TK.bfloat16().float(), weight_TK)
    assert weight_TK.min() > (0 if shape.top_k > 1 else 1 / shape.num_experts)
    assert shape.top_k == 1 or bool((weight_TK.sum(1) == 1).all())


def test_a_recorded_routing_is_another_layer_each_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "RECORDED", tmp_path / "routing.npz")
    g = torch.Generator().manual_seed(0)
    with pytest.raises(work.NoRecording, match=r"python -m bench\.routing makes it"):
        work.route(TINY, "recorded", 0, g)
    layers = np.stack([np.full((40, 2), [layer, layer + 1], dtype=np.uint8) for layer in range(3)])
    np.savez_compressed(tmp_path / "routing.npz", allow_pickle=False, E8_K2=layers)
    for index in range(4):
        expert_TK = work.route(TINY, "recorded", index, g)
        assert expert_TK.unique(dim=0).tolist() == [[index % 3, index % 3 + 1]] and len(expert_TK) == 64
    with pytest.raises(work.NoRecording, match="no run of 8 experts, 1 a token"):
        work.route(replace(TINY, top_k=1), "recorded", 0, g)


def test_gradients_that_stay_are_no_part_of_the_peak() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with LiveLog() as live:
        (weight * 2).backward(torch.ones(1000))
    assert live.peak == 3 * 4000, "product, its gradient and the weight's"
    assert weight.grad is not None
    assert live.peak_without([weight.grad]) == 2 * 4000


def test_what_comes_before_a_turn_is_told_of_it() -> None:
    told: list[tuple[int, str]] = []
    in_turn({"a": list, "b": list}, 2, before=lambda index, name: told.append((index, name)))
    assert told == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_the_page_gives_ratios_of_the_same_round() -> None:
    floor = peers.FLOORS[torch.float32]
    rows = [
        Row("Muster", [20, 40, 60], 3_000_000, 1e-6, "y"),
        Row(peers.GROUPED, [30, 60, 90], 6_000_000, 1e-6),
    ]
    rows += [Row("gone", note="not installed"), Row(floor, [10, 20, 30], 0)]
    block = Block("tiny", "float32", "balanced", floor, rows)
    text = page(
        "head", [TINY], [block, Block("tiny", "float32", "recorded", floor, note="no file")], 3, ["{}"]
    )
    ratios = f"2.00 [2.00, 2.00] | {peers.GROUPED} | 0.67 [0.67, 0.67] | 0.50"
    assert f"| tiny | float32 | balanced | {ratios} |" in text
    assert "| gone | not installed |" in text and "Not measured: no file." in text
    assert "median 20 ms, quartiles 15 to 25 ms (-25 % to +25 %)" in text
    assert [json.dumps(line) for line in block.lines()][2].startswith('{"shape": "tiny", "dtype": "float32"')


def test_a_shape_of_another_device_is_refused() -> None:
    with pytest.raises(SystemExit, match="--shape olmoe is not one of --device cpu"):
        bench.main(["--shape", "olmoe"])
