"""Damaged checkpoints are named and passed over, and the run still ends with the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import CALM, Workplace
from tests.commands.watch import assert_one_error, checkpoints_of

LONGER = "train.steps=12"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The calm run up to step 9, with checkpoints at steps 3, 6 and 9."""
    workplace = Workplace(tmp_path_factory.mktemp("torn"))
    workplace.train(*CALM, "train.steps=9", "checkpoint.every=3", "checkpoint.keep_last=3")
    return workplace


def copy(workplace: Workplace, name: str) -> Path:
    """A copy of the trained run, links kept."""
    target = workplace.run_dir.parent / name
    shutil.copytree(workplace.run_dir, target, symlinks=True)
    return target


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_a_hole(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8192:-4096] = bytes(4096)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damages",
    [
        {9: (truncate, "manifest.json"), 6: (flip_one_bit, "shard-00001.safetensors")},
        {9: (zero_a_hole, "shard-00000.safetensors"), 6: (Path.unlink, "shard-00000.safetensors")},
    ],
    ids=["truncated, flipped", "zeroed, missing"],
)
def test_damage_is_named_and_the_checkpoint_before_is_used(
    trained: Workplace, calm: Workplace, damages: dict[int, tuple[Callable[[Path], None], str]]
) -> None:
    run_dir = copy(trained, damages[9][0].__name__)
    files = {f"step-{step:08d}/{file}": damage for step, (damage, file) in damages.items()}
    for file, damage in files.items():
        damage(run_dir / "checkpoints" / file)
    output = trained.resume(LONGER, run_dir=run_dir)
    for file in files:
        assert_one_error(output, "alarm", "skipped a damaged checkpoint", file)
    assert [event["step"] for event in trained.events("resume", run_dir)] == [3]
    assert trained.digest(run_dir) == calm.digest()
    assert trained.losses(run_dir) == calm.losses()


def test_without_a_valid_one_nothing_is_trained_and_nothing_deleted(trained: Workplace) -> None:
    run_dir = copy(trained, "none")
    for step in (3, 6, 9):
        flip_one_bit(run_dir / "checkpoints" / f"step-{step:08d}" / "shard-00000.safetensors")
    before = {path: path.stat().st_size for path in (run_dir / "checkpoints").rglob("*")}
    output = trained.resume(LONGER, run_dir=run_dir, expect=2)
    assert_one_error(output, "none of the 3 checkpoints there is valid", "nothing was deleted")
    assert {path: path.stat().st_size for path in (run_dir / "checkpoints").rglob("*")} == before
    assert checkpoints_of(run_dir) == ["step-00000003", "step-00000006", "step-00000009"]
    assert trained.losses(run_dir) == trained.losses(), "what was logged stays"
