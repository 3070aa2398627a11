"""Slots, leases and room: what is sealed is found by the next process, and nothing else is."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.engines.base import StateSlice, Update
from parallel.errors import ConfigError
from trainer.checkpoint.lease import Lease, clean, memory_folder
from trainer.checkpoint.memory import Claim, MemoryTier, check_claims
from trainer.checkpoint.slots import HEADER_BYTES, Header
from trainer.checkpoint.timeline import Timelines
from trainer.checkpoint.vote import Snapshot

RNG = {"torch_rng": torch.arange(16, dtype=torch.uint8)}
TIMELINES = Timelines("run", [0])


def state(value: float) -> list[StateSlice]:
    """Two boxes of one tensor, an empty slice, a scalar and a strided view."""
    return [
        StateSlice("model.w", (4, 3), (0, 0), torch.full((2, 3), value), owner=True),
        StateSlice("model.w", (4, 3), (2, 0), torch.full((1, 3), value + 1), owner=False),
        StateSlice("model.empty", (0,), (0,), torch.empty(0), owner=True),
        StateSlice("optim.step.w", (), (), torch.tensor(value, dtype=torch.float64), owner=True),
        StateSlice(
            "model.t", (5, 2), (0, 0), torch.full((2, 5), value, dtype=torch.bfloat16).t(), owner=True
        ),
    ]


def tier(root: Path, layout: str = "layout") -> MemoryTier:
    run_dir = root / "runs" / "a" / "1"
    run_dir.mkdir(parents=True, exist_ok=True)
    made = MemoryTier(Lease(memory_folder(str(root), run_dir), run_dir), 0, 1, 0, layout, 3)
    made.claim("here", state(0), RNG)
    made.prepare(torch.device("cpu"))
    return made


def take(memory: MemoryTier, *steps: int, timelines: Timelines = TIMELINES) -> None:
    for step in steps:
        memory.snapshot(step, state(step), RNG, {"step": step}, timelines)
    memory.wait()


def offered(memory: MemoryTier) -> list[int]:
    return sorted(s.step for s in memory.offers("run", memory.plan(state(0), RNG).layout))


def test_what_a_killed_process_sealed_is_there(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        take(tier(tmp_path), 1, 2, 3, 4)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    memory = tier(tmp_path)
    assert offered(memory) == [2, 3, 4]
    into = state(0)
    assert memory.fault(Snapshot(4, 0)) is None
    found, tensors = memory.load(Snapshot(4, 0), into, list(RNG))
    assert found == {"step": 4} and torch.equal(tensors["torch_rng"], RNG["torch_rng"])
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(into, state(4), strict=True))
    assert offered(tier(tmp_path, "another layout")) == []
    memory.remove()


def test_a_changed_bit_anywhere_is_found(tmp_path: Path) -> None:
    memory = tier(tmp_path)
    take(memory, 1, 2, 3)
    (slot,) = memory.parts(Snapshot(3, 0))
    header = slot.header
    assert header is not None
    for place in (HEADER_BYTES, HEADER_BYTES + header.data_bytes + 3, header.size - 1):
        slot.bytes[place] ^= 4
        assert "has changed" in str(slot.fault())
        slot.bytes[place] ^= 4
    assert slot.fault() is None
    slot.bytes[HEADER_BYTES] ^= 4
    assert "rank-00000.slot-" in str(memory.fault(Snapshot(3, 0)))
    assert offered(memory) == [1, 2], "a damaged snapshot is struck off"
    raw = bytearray(header.render())
    raw[40] ^= 1
    assert Header.parse(bytes(raw)) is None and Header.parse(bytes(100)) is None
    memory.remove()
    assert not memory.lease.folder.exists()


def test_what_is_summed_as_it_is_copied_is_what_is_read(tmp_path: Path) -> None:
    """Tensors larger than a piece and than a block, with gaps, beside small and strided ones."""
    sizes = [3, (8 << 20) + 5, 70_001, 1, 1_300_003, (4 << 20) - 64]
    tensors = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
    tensors.append(torch.randn(300, 700).t())
    slices = [
        StateSlice(f"model.{i}", tuple(t.shape), (0,) * t.dim(), t, True) for i, t in enumerate(tensors)
    ]
    run_dir = tmp_path / "runs"
    run_dir.mkdir()
    memory = MemoryTier(Lease(memory_folder(str(tmp_path), run_dir), run_dir), 0, 1, 0, "layout", 3)
    memory.claim("here", slices, RNG)
    memory.prepare(torch.device("cpu"))
    for step in range(4):  # the last one over what was there
        tensors[1].bitwise_not_()
        memory.snapshot(step, slices, RNG, {}, TIMELINES)
        memory.wait()
        assert memory.fault(Snapshot(step, 0)) is None
    (slot,) = memory.parts(Snapshot(3, 0))
    for place in range(HEADER_BYTES, HEADER_BYTES + sum(sizes), 1_000_003):
        slot.bytes[place] ^= 128
        assert "has changed" in str(slot.fault())
        slot.bytes[place] ^= 128
    into = [StateSlice(p.name, p.global_shape, p.offsets, torch.zeros_like(p.tensor), True) for p in slices]
    memory.load(Snapshot(3, 0), into, list(RNG))
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(into, slices, strict=True))
    memory.remove()


def test_the_oldest_and_the_given_up_are_overwritten_first(tmp_path: Path) -> None:
    memory = tier(tmp_path)
    take(memory, 1, 2, 3, 4)
    assert offered(memory) == [2, 3, 4]
    take(memory, 3, timelines=Timelines("run", [0, 2]))
    held = sorted((s.step, s.timeline) for s in memory.offers("run", memory.plan(state(0), RNG).layout))
    assert (2, 0) in held and (3, 1) in held
    memory.remove()


def test_a_state_that_outgrows_its_slot(tmp_path: Path) -> None:
    memory = tier(tmp_path)
    memory.snapshot(1, state(1), RNG, {"long": "x" * 200_000}, TIMELINES)
    memory.wait()
    assert memory.fault(Snapshot(1, 0)) is None
    take(memory, 2, 3, 4, 5)
    assert offered(memory) == [3, 4, 5]
    memory.remove()


def test_folders_of_no_use_are_removed_and_held_ones_stay(tmp_path: Path) -> None:
    own, runs = tmp_path / "own", {}
    for name in ("ended", "gone", "held", "killed", "idle"):
        run_dir = tmp_path / name
        if name != "gone":
            run_dir.mkdir()
        folder = memory_folder(str(tmp_path), run_dir)
        runs[name] = (folder, Lease(folder, run_dir))
        (folder / "rank-00000.slot-0").touch()
    (tmp_path / "ended" / "events.jsonl").write_text('{"event": "start"}\n{"event": "finish"}\n')
    (tmp_path / "killed" / "events.jsonl").write_text('{"event": "finish"}\n{"event": "start"}\n')
    for name, (folder, lease) in runs.items():
        if name != "held":
            os.close(lease._descriptor)
        if name == "idle":
            os.utime(folder / "lease", (time.time() - 3600,) * 2)
    clean(runs["held"][0].parent, own)
    assert {name for name, (folder, _) in runs.items() if folder.exists()} == {"held", "killed"}


def test_room_is_checked_for_all_ranks_of_a_host_together() -> None:
    claims = [
        Claim("a", "/dev/shm", 60, 100),
        Claim("a", "/dev/shm", 30, 100),
        Claim("b", "/dev/shm", 90, 100),
    ]
    assert check_claims(claims) is None
    error = check_claims([*claims, Claim("b", "/dev/shm", 20, 100)])
    assert isinstance(error, ConfigError)
    assert "2 rank(s) on b need 110 bytes, 100 are free" in str(error) and "--shm-size" in str(error)


def test_a_mount_that_cannot_be_used_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"checkpoint\.memory_dir=.*snapshots cannot be kept there"):
        Lease(memory_folder(str(tmp_path / "file"), tmp_path), tmp_path)


def given(step: int, recipe: str = "sgd") -> Update:
    """What a step of ``state`` was given: the value that it leaves."""
    gradient = StateSlice("grad.w", (1,), (0,), torch.tensor([float(step)]), owner=True)
    buffer = StateSlice("model.t", (5, 2), (0, 0), state(step)[-1].tensor, owner=True)
    return Update(0.5 * step, None, [gradient], frozenset(), [buffer], recipe)


def logged(root: Path, recipe: str = "sgd") -> MemoryTier:
    run_dir = root / "runs" / "a" / "1"
    run_dir.mkdir(parents=True, exist_ok=True)
    made = MemoryTier(Lease(memory_folder(str(root), run_dir), run_dir), 0, 1, 0, "layout", 3, num_updates=2)
    made.claim("here", state(0), RNG, given(0, recipe))
    made.prepare(torch.device("cpu"))
    return made


def log(memory: MemoryTier, *steps: int, timelines: Timelines = TIMELINES) -> None:
    for step in steps:
        memory.snapshot(step, state(step), RNG, {"step": step}, timelines, update=given(step))
    memory.wait()


def test_updates_count_with_the_snapshot_that_they_follow_and_with_each_other(tmp_path: Path) -> None:
    memory = logged(tmp_path)
    log(memory, 1, 2, 3, 4, 5, 6)
    assert offered(memory) == [1, 4, 5, 6], "2 gave its place to 6, and 3 is nothing without it"
    into, done = state(0), []

    def again(lr: float, skip: Tensor | None, gradients: Mapping[str, Tensor]) -> None:
        assert skip is None
        done.append((lr, float(gradients["w"])))

    found, tensors = memory.load(Snapshot(6, 0), into, list(RNG), again)
    assert found == {"step": 6} and torch.equal(tensors["torch_rng"], RNG["torch_rng"])
    assert done == [(2.5, 5.0), (3.0, 6.0)]
    assert torch.equal(into[0].tensor, state(4)[0].tensor) and torch.equal(into[4].tensor, state(6)[4].tensor)

    middle = memory.parts(Snapshot(6, 0))[1]
    middle.bytes[HEADER_BYTES] ^= 4
    assert "rank-00000.log-" in str(memory.fault(Snapshot(6, 0)))
    assert offered(memory) == [1, 4], "without 5 there is no 6"
    memory.remove()
    assert not memory.lease.folder.exists()


def test_what_else_changes_the_state_is_copied_whole(tmp_path: Path) -> None:
    memory = logged(tmp_path)

    def is_whole(step: int) -> bool:
        memory.wait()
        return len(memory.parts(Snapshot(step, 0))) == 1

    log(memory, 1, 2)
    assert is_whole(1) and not is_whole(2)
    memory.start_anew()
    log(memory, 3)
    assert is_whole(3)
    take(memory, 4)  # nobody knows what the step was given
    assert is_whole(4)
    memory.snapshot(5, state(5), RNG, {}, TIMELINES, on_sealed=lambda slot: None, update=given(5))
    assert is_whole(5), "a peer keeps nothing to build upon"
    log(memory, 6)
    assert not is_whole(6)
    later = Timelines("run", [0, 6])
    log(memory, 7, timelines=later)
    assert len(memory.parts(Snapshot(7, 1))) == 1, "updates of a future that was given up are not built upon"
    log(memory, 8, timelines=later)
    other = logged(tmp_path)
    assert offered(other) == offered(memory) and len(other.parts(Snapshot(8, 1))) == 2
    log(other, 9, timelines=later)
    assert len(other.parts(Snapshot(9, 1))) == 1, "another process begins with everything"
    other.snapshot(10, state(10), RNG, {}, later, update=given(10, "sgd with momentum"))
    other.wait()
    assert len(other.parts(Snapshot(10, 1))) == 1, "a hook has changed the optimizer"
    log(other, 11, timelines=later)
    assert 11 in offered(other)
    resumed = logged(tmp_path, "adam")
    assert set(offered(other)) - set(offered(resumed)) == {8, 11}, "another optimizer has no use for them"
    memory.remove()
