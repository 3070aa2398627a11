"""A damaged newest checkpoint is named and passed over, and the run still ends with the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command import Workplace
from tests.commands.watch import EP2, assert_one_error, checkpoints_of

LONGER = "train.steps=12"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A run with checkpoints at steps 3, 6 and 9, and in ``calm`` a copy that went on to its end."""
    workplace = Workplace(tmp_path_factory.mktemp("torn"))
    constant = "optim.schedule=constant"  # so that the length of the run is not part of its first steps
    workplace.train(*EP2, constant, "train.steps=9", "checkpoint.every=3", "checkpoint.keep_last=3")
    copy(workplace, "calm")
    workplace.resume(LONGER, run_dir=workplace.run_dir.parent / "calm")
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
    ("damage", "file"),
    [
        (truncate, "manifest.json"),
        (flip_one_bit, "shard-00001.safetensors"),
        (zero_a_hole, "shard-00000.safetensors"),
        (Path.unlink, "shard-00000.safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damage_is_named_and_the_checkpoint_before_is_used(
    trained: Workplace, damage: Callable[[Path], None], file: str
) -> None:
    run_dir = copy(trained, f"{getattr(damage, '__name__', 'damage')}-{file}")
    damage(run_dir / "checkpoints" / "step-00000009" / file)
    output = trained.resume(LONGER, run_dir=run_dir)
    assert_one_error(output, "alarm", "skipped a damaged checkpoint", f"step-00000009/{file}")
    assert [event["step"] for event in trained.events("resume", run_dir)] == [6]
    calm = run_dir.parent / "calm"
    assert trained.digest(run_dir) == trained.digest(calm)
    assert trained.losses(run_dir) == trained.losses(calm)


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
