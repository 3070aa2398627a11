"""What is saved is what is loaded, bit for bit, through any change of layout."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import (
    expert_layout,
    load,
    one_process,
    random_layout,
    same_bits,
    sample_state,
    save,
    slice_of,
    visible,
)
from safetensors.torch import load_file

from parallel.engines.base import StateSlice
from parallel.errors import ConfigError
from trainer.checkpoint.digest import combine, weights_digest
from trainer.checkpoint.resume import Checkpoint, newest_valid, open_checkpoint


def newest(directory: Path) -> Checkpoint:
    found = newest_valid(directory, lambda path, reason: pytest.fail(f"{path} {reason}"))
    assert found is not None
    return found


@pytest.mark.parametrize("seed", range(6))
def test_any_layout_loads_into_any_other(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    state = sample_state(seed)
    world = rng.randint(1, 4)
    save(tmp_path, 7, random_layout(state, world, rng))
    checkpoint = newest(tmp_path)
    assert (checkpoint.step, checkpoint.world_size, checkpoint.info) == (7, world, {"world": world})
    weights = [s for s in one_process(state)[0] if s.name.startswith("model.")]
    assert checkpoint.weights_digest == combine([weights_digest(weights)])
    assert list(checkpoint.tensors) == [*state]
    for other in (1, 2, 3):
        load(checkpoint, random_layout(state, other, rng), state)
    load(checkpoint, one_process(state), state)


@pytest.mark.parametrize("dim", [0, 1])
def test_experts_reshard_between_ep_and_fsdp(tmp_path: Path, dim: int) -> None:
    state = sample_state()
    save(tmp_path, 3, expert_layout(state, 4, dim))
    for world in (1, 2, 3):
        for other in (0, 1, 2):
            load(newest(tmp_path), expert_layout(state, world, other), state)
    save(tmp_path, 4, expert_layout(state, 1, dim))
    load(newest(tmp_path), expert_layout(state, 4, 1 - dim), state)
    assert newest(tmp_path).step == 4


def test_trainer_state_and_rank_tensors_come_back(tmp_path: Path) -> None:
    trainer = {"step": 5, "tokens": 2**40, "lr": 0.1 + 0.2, "loader": {"epoch": 1, "rows": [1, 2]}, "id": "ü"}
    save(tmp_path, 5, expert_layout(sample_state(), 3, 0), trainer)
    checkpoint = newest(tmp_path)
    assert checkpoint.trainer == trainer
    for rank in range(3):
        assert checkpoint.rank_tensors(rank)["rng"].tolist() == [5, rank]
    assert checkpoint.rank_tensors(3) == {}


def test_files_are_plain_json_and_safetensors(tmp_path: Path) -> None:
    state = sample_state()
    save(tmp_path, 100, one_process(state))
    assert visible(tmp_path) == ["step-00000100"]
    assert visible(tmp_path / "step-00000100") == ["manifest.json", "shard-00000.safetensors"]
    stored = load_file(tmp_path / "step-00000100" / "shard-00000.safetensors")
    assert set(stored) == {name for name in state if state[name].numel()} | {"rank.0.rng"}
    for name in set(stored) & set(state):
        assert same_bits(stored[name], state[name])
    body = json.loads((tmp_path / "step-00000100" / "manifest.json").read_text())
    assert body["tensors"]["model.norm"]["dtype"] == "F16"
    assert body["checksum"].startswith("xxh3_128:")


def test_weights_alone_load_by_prefix(tmp_path: Path) -> None:
    state = sample_state()
    save(tmp_path, 1, expert_layout(state, 2, 0))
    weights = {name: whole for name, whole in state.items() if name.startswith("model.")}
    slices = [
        StateSlice(s.name, s.global_shape, s.offsets, torch.zeros_like(s.tensor), s.owner)
        for s in one_process(weights)[0]
    ]
    newest(tmp_path).load_into(slices, prefix="model.")
    assert all(same_bits(s.tensor, weights[s.name]) for s in slices)


def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = sample_state()
    save(tmp_path, 1, one_process(state))
    checkpoint = newest(tmp_path)

    def fails(changed: dict[str, torch.Tensor], match: str) -> None:
        slices = one_process(changed)[0]
        before = [s.tensor.clone() for s in slices]
        with pytest.raises(ConfigError, match=match):
            checkpoint.load_into(slices)
        assert all(same_bits(s.tensor, old) for s, old in zip(slices, before, strict=True))

    fails({**state, "model.new": torch.ones(2)}, "holds no tensor model.new, which this run needs")
    fails(
        {n: t for n, t in state.items() if n != "model.norm"},
        "tensor model.norm, which this run does not have",
    )
    fails({**state, "model.norm": torch.ones(14).half()}, r"model.norm has shape \[13\] there and \[14\]")
    fails({**state, "model.norm": torch.ones(13)}, "model.norm is F16 there and F32 in this run")


def test_open_by_step_best_run_and_wrong_path(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for step in (1, 2):
        save(directory, step, [[slice_of("model.w", torch.full((2,), float(step)), ((0,), (2,)))]])
    (directory / "best").symlink_to("step-00000001")
    assert open_checkpoint(tmp_path).step == 2
    assert open_checkpoint(directory).step == 2
    assert open_checkpoint(directory / "best").step == 1
    assert open_checkpoint(directory / "step-00000001", verify=False).step == 1
    with pytest.raises(ConfigError, match="no such directory"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="no committed checkpoints"):
        open_checkpoint(tmp_path / "other")
    assert newest_valid(tmp_path / "other") is None
    assert newest_valid(tmp_path / "absent") is None
