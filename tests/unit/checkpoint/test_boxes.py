"""Exact cover: every partition passes, every gap and overlap is named."""

from __future__ import annotations

import random

import pytest
from checkpoint_helpers import random_boxes

from trainer.checkpoint.boxes import cover_fault, find_overlap, intersect, volume

SHAPES = [(), (1,), (12,), (6, 7), (4, 5, 6), (0, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_any_partition_covers_and_any_change_does_not(shape: tuple[int, ...]) -> None:
    rng = random.Random(len(shape))
    for _ in range(50):
        boxes = random_boxes(shape, rng, cuts=6)
        rng.shuffle(boxes)
        assert cover_fault(shape, boxes) is None
        filled = [box for box in boxes if volume(box)]
        if not filled:
            continue
        victim = rng.choice(filled)
        rest = [box for box in filled if box != victim]
        assert f"{volume(victim)} of its" in str(cover_fault(shape, rest))
        assert "doubled" in str(cover_fault(shape, [*filled, victim]))


def test_overlap_that_no_cut_separates() -> None:
    pinwheel = [((0, 0), (2, 1)), ((0, 1), (1, 2)), ((1, 2), (2, 1)), ((2, 0), (1, 2)), ((1, 1), (1, 1))]
    assert cover_fault((3, 3), pinwheel) is None
    pinwheel[0] = ((0, 0), (2, 2))
    pair = find_overlap(pinwheel)
    assert pair is not None and intersect(*pair)


def test_gap_names_the_rows_and_boxes_stay_inside() -> None:
    assert "rows 4 to 5 of dim 0" in str(cover_fault((8, 3), [((0, 0), (4, 3)), ((6, 0), (2, 3))]))
    assert "rows 0 to 7 of dim 0" in str(cover_fault((8, 3), [((0, 0), (8, 2))]))
    assert "outside" in str(cover_fault((8, 3), [((1, 0), (8, 3))]))
    assert "outside" in str(cover_fault((8, 3), [((0,), (8,))]))


def test_a_large_grid_needs_no_comparison_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[object] = []
    monkeypatch.setattr("trainer.checkpoint.boxes.intersect", lambda a, b: compared.append((a, b)))
    boxes = [((16 * i, 16 * j), (16, 16)) for i in range(128) for j in range(128)]
    random.Random(0).shuffle(boxes)
    assert cover_fault((2048, 2048), boxes) is None
    assert not compared  # pair by pair it would be 134 million
