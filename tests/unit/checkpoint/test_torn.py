"""Damage to the newest checkpoint, file by file: never a wrong load, always a named file."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import expert_layout, load, one_process, sample_state, save

from parallel.errors import ConfigError
from trainer.checkpoint.resume import newest_valid, open_checkpoint

FILES = ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]


def truncate(path: Path, rng: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(rng.randrange(path.stat().st_size))


def flip_bit(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def punch_hole(path: Path, rng: random.Random) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(rng.randrange(max(1, size - (64 << 10))))
        file.write(bytes(min(64 << 10, size - file.tell())))


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def extend(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def big_state(seed: int) -> dict[str, torch.Tensor]:
    state = sample_state(seed)
    generator = torch.Generator().manual_seed(seed)
    return {**state, "model.experts.big": torch.randn(8, 100, 100, generator=generator)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        save(directory, step, expert_layout(big_state(step), 2, 0))
    return directory


@pytest.mark.parametrize("damage", [truncate, flip_bit, punch_hole, remove, extend])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_found_named_and_passed_over(
    saved: Path, tmp_path: Path, file: str, damage: Callable[[Path, random.Random], None]
) -> None:
    for seed in range(1 if damage in (remove, extend) else 8):
        directory = tmp_path / str(seed)
        shutil.copytree(saved, directory)
        victim = directory / "step-00000002" / file
        damage(victim, random.Random(seed))
        skipped: list[tuple[Path, str]] = []
        checkpoint = newest_valid(directory, lambda path, reason, to=skipped: to.append((path, reason)))
        assert [path for path, _ in skipped] == [victim]
        assert checkpoint is not None and checkpoint.step == 1
        load(checkpoint, one_process(big_state(1)), big_state(1))
        with pytest.raises(ConfigError) as error:
            open_checkpoint(victim.parent).load_into([])
        assert file in str(error.value)


def test_none_valid_is_an_error_that_deletes_nothing(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    flip_bit(directory / "step-00000001" / FILES[1], random.Random(0))
    remove(directory / "step-00000002" / FILES[0], random.Random(0))
    before = sorted(path.relative_to(directory) for path in directory.rglob("*"))
    with pytest.raises(ConfigError) as error:
        newest_valid(directory, lambda path, reason: None)
    assert error.value.field == "checkpoints" and error.value.value == directory
    assert "none of the 2 checkpoints there is valid" in error.value.relation
    assert f"step-00000001/{FILES[1]}" in error.value.relation
    assert f"step-00000002/{FILES[0]} is missing" in error.value.relation
    assert sorted(path.relative_to(directory) for path in directory.rglob("*")) == before


def test_damage_after_the_choice_is_found_by_a_rank_that_did_not_verify(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    checkpoint = open_checkpoint(directory / "step-00000002", verify=False)
    flip_bit(directory / "step-00000002" / FILES[2], random.Random(0))
    slices = one_process({name: torch.zeros_like(t) for name, t in big_state(2).items()})[0]
    with pytest.raises(ConfigError, match=r"shard-00001\.safetensors: has changed"):
        checkpoint.load_into(slices)
    assert not any(part.tensor.any() for part in slices)
    with pytest.raises(ConfigError, match=r"shard-00001\.safetensors: has changed"):
        checkpoint.rank_tensors(1)


def test_a_step_under_another_steps_name_is_passed_over(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "step-00000001", tmp_path / "step-00000009")
    shutil.copytree(saved / "step-00000002", tmp_path / "step-00000002")
    skipped: list[Path] = []
    found = newest_valid(tmp_path, lambda path, reason: skipped.append(path))
    assert found is not None and found.step == 2
    assert skipped == [tmp_path / "step-00000009" / "manifest.json"]
