"""A small cut of bench/torn.py: saves killed at their system calls leave what was committed, and only that."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.torn import damage, kills


def test_a_save_killed_at_a_system_call_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    found = kills(tmp_path, every=13)
    assert found["faults"] == []
    assert found["calls"] > 80 and min(found["kills"].values()) >= 6, "each way of dying was tried"


def test_every_kind_of_damage_is_passed_over(tmp_path: Path) -> None:
    found = damage(tmp_path, num_flips=4)
    assert found["faults"] == []
    kinds = {name.split(": ")[1] for name in found["counts"]}
    assert kinds >= {
        "bit flipped",
        "truncated",
        "holed",
        "holed to the end",
        "removed",
        "another file's contents",
    }
