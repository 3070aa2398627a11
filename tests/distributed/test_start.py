"""What ranks agree on before the first step."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import cases
from tests.distributed.pool import Pool


def test_all_ranks_see_the_same_run_directory(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(cases.see_directory, 3, [str(tmp_path)] * 3) == ["seen"] * 3
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_rank_that_sees_another_directory_is_named_to_everyone(pool: Pool, tmp_path: Path) -> None:
    for name in ("shared", "other"):
        (tmp_path / name).mkdir()
    shared, other = str(tmp_path / "shared"), str(tmp_path / "other")
    answers = pool.run(cases.see_directory, 3, [shared, other, shared])
    for answer in answers:
        assert "every node must see the same run directory" in answer
        assert "cannot see what rank 0 wrote there" in answer
        assert "Fix: run.root=" in answer
