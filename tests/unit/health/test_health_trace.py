"""Routing traces: what was written is what is replayed, and mistakes are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_health_maps import choices, stats

from parallel.errors import ConfigError
from trainer.health.trace import Trace, TraceFacts, TraceWriter, forget_later

FACTS = TraceFacts(fingerprint="abc", layers=(1, 3), num_experts=300, top_k=2, seq_len=5)
CPU = torch.device("cpu")


def record(folder: Path, steps: int = 3, world: int = 2) -> dict[tuple[int, int], torch.Tensor]:
    """Two ranks with two micro-batches of two samples a step; (step, sample) → experts [L, S, K]."""
    truth = {}
    for rank in range(world):
        writer = TraceWriter(folder / "traces", rank, world, "abc")
        for step in range(1, steps + 1):
            for micro in range(2):
                ids = [100 * step + 4 * micro + 2 * rank, -1 if micro else 100 * step + 2 * rank + 1]
                layers = [
                    choices((2, 5), 2, 300, seed=hash((rank, step, micro, layer)) % 2**31) for layer in (1, 3)
                ]
                writer.add([stats(x, 300) for x in layers], torch.tensor(ids))
                truth.update({(step, n): torch.stack(layers)[:, i] for i, n in enumerate(ids) if n >= 0})
            writer.save("train", step, [1, 3])
        writer.close()
    return truth


def test_any_rank_finds_any_sample_again(tmp_path: Path) -> None:
    truth = record(tmp_path)
    trace = Trace(tmp_path, FACTS)
    trace.require("train", range(1, 4))
    assert not trace.has_evaluations
    for step in (2, 1, 3):
        ids = [n for at, n in truth if at == step][::-1]
        found = trace.choices("train", step, torch.tensor([*ids, -1]), CPU)
        assert [layer.dtype for layer in found] == [torch.int64] * 2
        for index, number in enumerate(ids):
            assert torch.equal(torch.stack([layer[index] for layer in found]), truth[step, number])


def test_a_trace_of_something_else_is_refused(tmp_path: Path) -> None:
    record(tmp_path)
    ids = torch.tensor([100])
    for facts, said in (
        (replace(FACTS, fingerprint="xyz"), r"data \(fingerprint\): abc; this run has xyz"),
        (replace(FACTS, layers=(0, 1)), r"MoE layers: \[1, 3\]; this run has \[0, 1\]"),
        (replace(FACTS, num_experts=8), "num_experts, zero and copy experts counted: 300; this run has 8"),
        (replace(FACTS, top_k=1), "choices a token: 2; this run has 1"),
        (replace(FACTS, seq_len=4), r"train\.seq_len: 5; this run has 4"),
    ):
        with pytest.raises(ConfigError, match=said):
            Trace(tmp_path, facts).choices("train", 1, ids, CPU)
    trace = Trace(tmp_path, FACTS)
    with pytest.raises(ConfigError, match=r"health\.replay=.*routes of 3 steps from 1 to 3 .*not of step 4"):
        trace.require("train", range(1, 9))
    with pytest.raises(ConfigError, match=r"step 1 \(train\) was recorded without sample 99"):
        trace.choices("train", 1, torch.tensor([99]), CPU)
    with pytest.raises(ConfigError, match="holds no routing trace"):
        Trace(tmp_path / "elsewhere", FACTS)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    record(tmp_path)
    files = sorted((tmp_path / "traces").glob("train-00000001*"))
    files[1].unlink()
    with pytest.raises(ConfigError, match="has 1 of 2 ranks' files"):
        Trace(tmp_path, FACTS).choices("train", 1, torch.tensor([100]), CPU)
    files[0].write_bytes(files[0].read_bytes()[:50])
    with pytest.raises(ConfigError, match=r"train-00000001\.rank-0000\.safetensors cannot be read"):
        Trace(tmp_path, FACTS).choices("train", 1, torch.tensor([100]), CPU)


def test_later_steps_are_forgotten(tmp_path: Path) -> None:
    record(tmp_path)
    forget_later(tmp_path / "traces", 2)
    with pytest.raises(ConfigError, match="from 1 to 2"):
        Trace(tmp_path, FACTS).require("train", [3])


def test_a_disk_that_refuses_is_an_error_of_the_run(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "traces", 0, 1, "abc")
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / ".train-00000001.rank-0000.safetensors").mkdir()  # in the way of the file
    writer.add([stats(choices((1, 5), 2, 300, 0), 300)], torch.tensor([0]))
    writer.save("train", 1, [0])
    with pytest.raises(ConfigError, match=r"train-00000001\.rank-0000"):
        writer.close()
