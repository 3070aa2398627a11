"""Commit by many ranks without collectives: what is refused, who is told, what stays on disk."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import (
    checkpointer,
    expert_layout,
    in_threads,
    load,
    one_process,
    random_layout,
    sample_state,
    save,
    slice_of,
    visible,
)

from parallel.engines.base import StateSlice
from trainer.checkpoint import commit, durable
from trainer.checkpoint.durable import DurableCheckpointer, StorageError, remove_stale
from trainer.checkpoint.resume import newest_valid
from trainer.checkpoint.shards import ShardImage
from trainer.checkpoint.whole import Contents, contents_of


def failing(path: Path, reason: str) -> None:
    pytest.fail(f"{path} {reason}")


def one_tensor(value: float, size: int = 64) -> list[StateSlice]:
    return [slice_of("model.w", torch.full((size,), value), ((0,), (size,)))]


@pytest.mark.parametrize("world_size", [2, 4])
def test_many_saves_of_many_ranks_in_flight(tmp_path: Path, world_size: int) -> None:
    states = [sample_state(step) for step in range(1, 6)]
    layouts = [random_layout(state, world_size, random.Random(7)) for state in states]
    ranks = [checkpointer(tmp_path, rank, world_size, keep_last=9) for rank in range(world_size)]

    def run(rank: int) -> None:
        live = [
            StateSlice(s.name, s.global_shape, s.offsets, s.tensor.clone(), s.owner) for s in layouts[0][rank]
        ]
        trainer: dict[str, object] = {}
        for step, layout in enumerate(layouts, start=1):
            for part, new in zip(live, layout[rank], strict=True):
                part.tensor.copy_(new.tensor)
            trainer["nested"] = [step]
            ranks[rank].save(step, live, trainer, {"rng": torch.tensor([step])}, {})
            for part in live:
                part.tensor.fill_(1)  # what training does next must not reach the checkpoint
            trainer["nested"].append("later")  # type: ignore[attr-defined]
        ranks[rank].wait()

    assert in_threads([lambda r=r: run(r) for r in range(world_size)]) == [None] * world_size
    assert visible(tmp_path) == [f"step-{step:08d}" for step in range(1, 6)]
    for step in range(5, 0, -1):
        checkpoint = newest_valid(tmp_path, failing)
        assert checkpoint is not None and checkpoint.step == step
        assert checkpoint.trainer == {"nested": [step]}
        assert checkpoint.rank_tensors(world_size - 1)["rng"].tolist() == [step]
        load(checkpoint, one_process(states[step - 1]), states[step - 1])
        checkpoint.path.rename(tmp_path / f"seen-{step}")
    for rank, own in enumerate(ranks):
        results = own.poll()
        assert [result.step for result in results] == [1, 2, 3, 4, 5]
        assert results[0].path == tmp_path / "step-00000001"
        stored = sum(path.stat().st_size for path in (tmp_path / "seen-1").glob("*.safetensors"))
        own_shard = (tmp_path / "seen-1" / f"shard-{rank:05d}.safetensors").stat().st_size
        assert results[0].bytes == (stored if rank == 0 else own_shard)
        assert all(result.seconds_written > 0 and result.seconds_stalled > 0 for result in results)
        assert own.poll() == []


def refused(
    directory: Path, layout: list[list[StateSlice]], contents: Contents | None = None
) -> StorageError:
    """Every rank must be told of the refusal; nothing may be committed or left half-written."""
    before = [name for name in visible(directory) if name.startswith("step-")]
    options = {"attempt": "refused", "contents": contents}
    ranks = [checkpointer(directory, rank, len(layout), **options) for rank in range(len(layout))]

    def run(rank: int) -> None:
        ranks[rank].save(2, layout[rank], {}, {}, {})
        ranks[rank].wait()

    errors = in_threads([lambda r=r: run(r) for r in range(len(layout))])
    assert all(isinstance(error, StorageError) for error in errors)
    assert [name for name in visible(directory) if name.startswith("step-")] == before
    assert not list(directory.glob(".*.tmp"))
    assert not any(rank.poll() or rank.committed(2) for rank in ranks)
    for error in errors[1:]:
        assert isinstance(error, StorageError) and "rank 0 gave up" in error.relation
    assert isinstance(errors[0], StorageError)
    return errors[0]


def test_a_tensor_that_no_rank_names_is_refused(tmp_path: Path) -> None:
    def part(name: str) -> StateSlice:
        return slice_of(name, torch.ones(4), ((0,), (4,)))

    slots = [f"optim.{slot}.experts.{index}" for slot in ("exp_avg", "exp_avg_sq") for index in range(3)]
    names = [*(f"model.experts.{index}" for index in range(3)), *slots]
    save(tmp_path, 1, [[part(name) for name in names]])
    for name in ("optim.exp_avg_sq.experts.1", "optim.exp_avg.experts.0", "model.experts.2"):
        error = refused(tmp_path, [[part(other) for other in names if other != name]])
        assert error.value == name and "no rank holds it" in error.relation


def test_a_tensor_of_the_model_that_no_rank_names_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        contents = contents_of(
            torch.nn.ModuleDict({"a": torch.nn.Embedding(2, 2), "b": torch.nn.BatchNorm1d(2)})
        )
    shapes = {"a.weight": (2, 2), "b.weight": (2,), "b.bias": (2,)}
    buffers = {"b.running_mean": (2,), "b.running_var": (2,), "b.num_batches_tracked": ()}
    assert contents.shapes == {f"model.{name}": shape for name, shape in (shapes | buffers).items()}
    named = {f"model.{name}": shape for name, shape in (shapes | buffers).items()}
    named |= {f"optim.{slot}.{name}": shape for slot in ("m", "v") for name, shape in shapes.items()}

    def state(**changes: tuple[int, ...] | None) -> list[StateSlice]:
        shaped = {**named, **changes}
        return [whole(name, shape) for name, shape in shaped.items() if shape is not None]

    def whole(name: str, shape: tuple[int, ...]) -> StateSlice:
        return slice_of(name, torch.ones(shape), (tuple(0 for _ in shape), shape))

    save(tmp_path, 1, [state()], contents=contents)
    nothing_of_a = {name: None for name in named if name.endswith(".a.weight")}
    for changes, name, fault in (
        (nothing_of_a, "model.a.weight", "no rank holds it"),
        ({"optim.m.b.bias": None, "optim.v.b.bias": None}, "optim.m.b.bias", "no rank holds it"),
        ({"model.b.num_batches_tracked": None}, "model.b.num_batches_tracked", "no rank holds it"),
        ({"model.a.weight": (1, 2)}, "model.a.weight", "shape [1, 2], and the model has [2, 2]"),
        (
            {"optim.v.a.weight": (1, 2)},
            "optim.v.a.weight",
            "shape [1, 2] is not that of the parameter, [2, 2]",
        ),
    ):
        error = refused(tmp_path, [state(**changes)], contents)
        assert error.value == name and fault in error.relation, error


def test_a_missing_expert_or_optimizer_slot_is_refused(tmp_path: Path) -> None:
    state = sample_state()
    save(tmp_path, 1, one_process(state))
    for name in ("model.layers.0.moe.experts.w1", "optim.exp_avg.layers.0.moe.experts.w1"):
        layout = expert_layout(state, 2, 0)
        layout[1] = [s for s in layout[1] if s.name != name]
        error = refused(tmp_path, layout)
        assert error.value == name
        assert "120 of its 240 elements are missing, the first in rows 4 to 7 of dim 0" in error.relation
        remove_stale(tmp_path, "none")


def test_a_tensor_without_an_owner_is_refused(tmp_path: Path) -> None:
    layout = expert_layout(sample_state(), 2, 0)
    layout[0] = [
        s if s.name != "optim.step" else StateSlice(s.name, (), (), s.tensor, False) for s in layout[0]
    ]
    error = refused(tmp_path, layout)
    assert error.value == "optim.step" and "1 of its 1 elements are missing" in error.relation


def test_a_doubled_expert_is_refused(tmp_path: Path) -> None:
    state = sample_state()
    layout = expert_layout(state, 2, 0)
    whole = state["model.layers.0.moe.experts.w1"]
    layout[1].append(slice_of("model.layers.0.moe.experts.w1", whole, ((3, 0, 0), (1, 6, 5))))
    error = refused(tmp_path, layout)
    assert error.value == "model.layers.0.moe.experts.w1" and "doubled" in error.relation


def test_ranks_that_disagree_on_a_tensor_are_refused(tmp_path: Path) -> None:
    layout = [one_tensor(1.0), [slice_of("model.w", torch.ones(64, 2), ((0, 0), (64, 2)), owner=False)]]
    error = refused(tmp_path, layout)
    assert (
        error.value == "model.w" and "rank 1 holds it as F32[64, 2], lower ranks as F32[64]" in error.relation
    )


def test_missing_ranks_are_named_after_the_timeout(tmp_path: Path) -> None:
    layout = expert_layout(sample_state(), 4, 0)
    ranks = [checkpointer(tmp_path, rank, 4, timeout_seconds=0.5) for rank in range(4)]

    def run(rank: int) -> None:
        ranks[rank].save(3, layout[rank], {}, {}, {})
        ranks[rank].wait()

    errors = in_threads([lambda r=r: run(r) for r in (0, 2)])
    for error in errors:
        assert isinstance(error, StorageError)
        assert "nothing was written by rank(s) 1, 3" in error.relation
    assert not list(tmp_path.glob("*step-*.tmp")) and not ranks[0].committed(3)
    # A rank that comes late is told at once and leaves nothing behind.
    error = in_threads([lambda: run(3)])[0]
    assert isinstance(error, StorageError) and "rank(s) 1, 3" in error.relation
    assert not list(tmp_path.glob("*step-*.tmp"))


def test_rank_0_that_never_comes_is_named(tmp_path: Path) -> None:
    own = checkpointer(tmp_path, 1, 2, timeout_seconds=0.1)
    own.save(3, [], {}, {}, {})
    with pytest.raises(StorageError, match="rank 0 had neither committed it nor given up"):
        own.wait()
    own.wait()  # said once


def test_a_failing_rank_tells_rank_0_why(tmp_path: Path) -> None:
    layout = expert_layout(sample_state(), 2, 0)
    ranks = [checkpointer(tmp_path, rank, 2) for rank in range(2)]
    # The place of rank 1's shard is taken by a directory: a real refusal of the file system.
    (tmp_path / ".step-00000001.gen0-1.tmp" / "shard-00001.safetensors").mkdir(parents=True)

    def run(rank: int) -> None:
        ranks[rank].save(1, layout[rank], {}, {}, {})
        ranks[rank].wait()

    errors = in_threads([lambda r=r: run(r) for r in range(2)])
    assert "Is a directory" in str(errors[1])
    assert "rank 1 gave up: the file system failed: Is a directory" in str(errors[0])
    assert not list(tmp_path.glob("*.tmp"))


def test_an_error_is_raised_by_the_next_save_which_does_not_begin(tmp_path: Path) -> None:
    own = checkpointer(tmp_path)
    half = slice_of("model.w", torch.ones(4), ((0,), (2,)))
    own.save(1, [half], {}, {}, {})
    with pytest.raises(StorageError, match=r"model\.w"):
        own.save(2, one_tensor(2.0), {}, {}, {})
    own.save(3, one_tensor(3.0), {}, {}, {})
    own.wait()
    assert visible(tmp_path) == ["step-00000003"]


def test_saving_a_committed_step_again_keeps_it_if_it_is_the_same(tmp_path: Path) -> None:
    save(tmp_path, 1, [one_tensor(1.0)])
    inode = (tmp_path / "step-00000001").stat().st_ino
    save(tmp_path, 1, [one_tensor(1.0)])
    assert (tmp_path / "step-00000001").stat().st_ino == inode
    assert visible(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_saving_a_committed_step_again_replaces_it_if_it_is_not(tmp_path: Path, world_size: int) -> None:
    first, second = sample_state(1), sample_state(2)
    save(tmp_path, 1, expert_layout(first, 2, 0))
    save(tmp_path, 1, expert_layout(second, world_size, 0))
    checkpoint = newest_valid(tmp_path, failing)
    assert checkpoint is not None
    load(checkpoint, one_process(second), second)
    # The same content, but the one on disk has rotted.
    shard = tmp_path / "step-00000001" / "shard-00000.safetensors"
    shard.write_bytes(bytes(shard.stat().st_size))
    save(tmp_path, 1, expert_layout(second, world_size, 0))
    checkpoint = newest_valid(tmp_path, failing)
    assert checkpoint is not None
    load(checkpoint, one_process(second), second)
    assert visible(tmp_path) == ["step-00000001"]


def test_some_valid_checkpoint_is_there_at_any_time_of_a_replacement(tmp_path: Path) -> None:
    save(tmp_path, 1, [one_tensor(0.0)])
    stop = threading.Event()

    def write() -> None:
        try:
            for value in range(1, 40):
                save(tmp_path, 1, [one_tensor(float(value))])
        finally:
            stop.set()

    def watch() -> None:
        while not stop.is_set():
            # Listing a directory is not atomic: a name may be missed while it is changed, but not each time.
            names = {path.name for _ in range(3) for path in tmp_path.glob("step-*")}
            assert names

    assert in_threads([write, watch]) == [None, None]


def test_a_crash_between_the_two_renames_of_a_replacement(tmp_path: Path) -> None:
    save(tmp_path, 1, [one_tensor(1.0)])
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.replaced")
    found = newest_valid(tmp_path, failing)
    assert found is not None and found.step == 1
    assert remove_stale(tmp_path, "next") == []
    assert visible(tmp_path) == ["step-00000001"]
    # And after the second rename: the new one has the name, the old one goes.
    save(tmp_path, 2, [one_tensor(2.0)])
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000001.replaced")
    assert remove_stale(tmp_path, "next") == [tmp_path / "step-00000001.replaced"]
    assert visible(tmp_path) == ["step-00000001"]


def test_stale_leftovers_of_other_attempts_only_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1, [one_tensor(1.0)])
    names = [
        ".step-00000002.gen1-3.tmp",
        ".step-00000002.gen-2-1.tmp",
        ".step-00000001.removed-0.tmp",
        ".step-00000002.gen2-1.tmp",
        "notes",
    ]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-00000.safetensors").touch()
    (tmp_path / ".step-00000002.gen1-3.failed").touch()
    (tmp_path / ".best.gen1-0.tmp").symlink_to("step-00000001")
    assert len(remove_stale(tmp_path, "gen2")) == 5
    assert visible(tmp_path) == [".step-00000002.gen2-1.tmp", "notes", "step-00000001"]
    assert remove_stale(tmp_path / "absent", "gen2") == []


def run_steps(own: DurableCheckpointer, steps: list[int]) -> None:
    for step in steps:
        own.save(step, one_tensor(float(step)), {}, {}, {})
        own.wait()


def test_retention(tmp_path: Path) -> None:
    own = checkpointer(tmp_path, keep_last=2, keep_every=4)
    run_steps(own, [1, 2])
    own.mark_best(2)
    run_steps(own, [3, 4, 5, 6, 7])
    assert visible(tmp_path) == ["best"] + [f"step-{step:08d}" for step in (2, 4, 6, 7)]
    assert (tmp_path / "best").readlink() == Path("step-00000002")
    own.mark_best(7)
    assert (tmp_path / "best").resolve() == tmp_path / "step-00000007"
    run_steps(own, [9])
    assert visible(tmp_path) == ["best"] + [f"step-{step:08d}" for step in (4, 7, 9)]


def test_best_of_a_step_in_flight_is_linked_once_it_is_committed(tmp_path: Path) -> None:
    own = checkpointer(tmp_path)
    own.save(1, one_tensor(1.0), {}, {}, {})
    own.mark_best(1)
    own.wait()
    assert (tmp_path / "best").readlink() == Path("step-00000001")
    with pytest.raises(ValueError, match="only a saved step can be the best"):
        own.mark_best(2)
    checkpointer(tmp_path, 1, 2).mark_best(2)  # other ranks leave it to rank 0


def test_a_shard_that_does_not_read_back_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = checkpointer(tmp_path, keep_last=1)
    run_steps(own, [1])
    write_shard = commit.write_shard

    def write_to_a_bad_disk(path: Path, image: ShardImage) -> str:
        checksum = write_shard(path, image)
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        return checksum

    monkeypatch.setattr(commit, "write_shard", write_to_a_bad_disk)
    with pytest.raises(
        StorageError, match=r"shard-00000\.safetensors: read back after the commit, it has changed"
    ):
        run_steps(own, [2])
    assert visible(tmp_path) == ["step-00000001"]


def test_a_rank_that_reads_back_something_else_makes_all_give_the_step_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, [one_tensor(1.0)])
    save(tmp_path, 3, [one_tensor(3.0)])
    layout = expert_layout(sample_state(), 3, 0)
    ranks = [checkpointer(tmp_path, rank, 3, keep_last=1) for rank in range(3)]
    file_fault = commit.file_fault

    def seen(path: Path, *rest: Any, **how: Any) -> str | None:
        if how and path.name == "shard-00001.safetensors":  # rank 1's, read from the disk
            return "has changed"
        return file_fault(path, *rest, **how)

    def run(rank: int) -> None:
        ranks[rank].save(3, layout[rank], {}, {}, {})
        if rank == 0:
            ranks[0].mark_best(3)
        ranks[rank].wait()

    monkeypatch.setattr(commit, "file_fault", seen)
    errors = in_threads([lambda r=r: run(r) for r in range(3)])
    for error in errors[:2]:
        assert isinstance(error, StorageError)
        assert "read back after the commit, it has changed; older checkpoints were kept" in error.relation
        assert str(error.value).endswith("step-00000003/shard-00001.safetensors")
    assert (errors[0].rank, errors[1].rank) == (1, None)  # type: ignore[union-attr]
    kept = [name for name in visible(tmp_path) if not name.endswith(".failed")]
    assert kept == ["step-00000001", "step-00000003"], "no link to it, and what it replaced is back"
    found = newest_valid(tmp_path, failing)
    assert found is not None and found.step == 3 and not (found.path / "shard-00001.safetensors").exists()


def test_nothing_goes_before_every_rank_has_read_its_shard_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, [one_tensor(1.0)])
    layout = expert_layout(sample_state(), 2, 0)
    ranks = [checkpointer(tmp_path, rank, 2, keep_last=1, timeout_seconds=5.0) for rank in range(2)]
    may, file_fault = threading.Event(), commit.file_fault

    def slow(path: Path, *rest: Any, **how: Any) -> str | None:
        if how and path.name == "shard-00001.safetensors":
            may.wait()
        return file_fault(path, *rest, **how)

    monkeypatch.setattr(commit, "file_fault", slow)
    for rank in range(2):
        ranks[rank].save(2, layout[rank], {}, {}, {})
    while not ranks[0].committed(2) or (tmp_path / "step-00000002" / "part-00000.json").exists():
        time.sleep(0.001)
    assert visible(tmp_path) == ["step-00000001", "step-00000002"] and not ranks[0].poll()
    assert newest_valid(tmp_path, failing).step == 2, "a crash now loses nothing"  # type: ignore[union-attr]
    assert remove_stale(tmp_path, "gen0") == [tmp_path / "step-00000002" / "part-00001.json"]
    may.set()
    for rank in range(2):
        ranks[rank].wait()
    assert visible(tmp_path) == ["step-00000002"] and ranks[0].poll()
    assert not list((tmp_path / "step-00000002").glob("part-*"))


def test_a_rank_that_never_reads_its_shard_back_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, [one_tensor(1.0)])
    layout = expert_layout(sample_state(), 2, 0)
    ranks = [checkpointer(tmp_path, rank, 2, keep_last=1, timeout_seconds=0.5) for rank in range(2)]
    read_back = durable.read_back
    monkeypatch.setattr(
        durable, "read_back", lambda attempt, rank, *rest: rank or read_back(attempt, rank, *rest)
    )
    for rank in range(2):
        ranks[rank].save(2, layout[rank], {}, {}, {})
    with pytest.raises(StorageError, match="after the commit, rank 1 has not read its shard back") as late:
        ranks[0].wait()
    assert late.value.rank == 1
    assert visible(tmp_path) == ["step-00000001", "step-00000002"], "both stay"


def test_trainer_state_that_is_not_json_is_the_callers_error(tmp_path: Path) -> None:
    own = checkpointer(tmp_path)
    with pytest.raises(TypeError):
        own.save(1, one_tensor(1.0), {"x": object()}, {}, {})
    run_steps(own, [2])
    assert json.loads((tmp_path / "step-00000002" / "manifest.json").read_text())["trainer"] == {}
