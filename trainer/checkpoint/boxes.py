"""Rectangles of tensor indices: the arithmetic of resharding and of exact cover. Torch-free.

A box is ``(offsets, shape)``, both of the tensor's rank. A 0-dim tensor has one element, box ``((), ())``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

Box = tuple[tuple[int, ...], tuple[int, ...]]


def volume(box: Box) -> int:
    """Number of elements."""
    return math.prod(box[1])


def inside(box: Box, global_shape: Sequence[int]) -> bool:
    """Whether the box has the tensor's rank and lies within it."""
    offsets, shape = box
    if not len(offsets) == len(shape) == len(global_shape):
        return False
    return all(o >= 0 and s >= 0 and o + s <= g for o, s, g in zip(offsets, shape, global_shape, strict=True))


def intersect(a: Box, b: Box) -> Box | None:
    """The elements in both, or None if there are none."""
    starts = tuple(max(x, y) for x, y in zip(a[0], b[0], strict=True))
    stops = [min(xo + xs, yo + ys) for xo, xs, yo, ys in zip(a[0], a[1], b[0], b[1], strict=True)]
    shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return None if any(s <= 0 for s in shape) else (starts, shape)


def find_overlap(boxes: list[Box]) -> tuple[Box, Box] | None:
    """Two of the non-empty boxes that share an element, or None.

    Cuts the list along dims wherever no box crosses, which splits every grid into single boxes in
    O(n log n); only what no cut separates is compared pair by pair.
    """
    if len(boxes) < 2:
        return None
    for dim in range(len(boxes[0][0])):
        groups = _separate(boxes, dim)
        if len(groups) > 1:
            return next((pair for group in groups if (pair := find_overlap(group))), None)
    for index, a in enumerate(boxes):
        for b in boxes[index + 1 :]:
            if intersect(a, b):
                return a, b
    return None


def _separate(boxes: list[Box], dim: int) -> list[list[Box]]:
    groups: list[list[Box]] = []
    reach = -1
    for box in sorted(boxes, key=lambda b: b[0][dim]):
        if not groups or box[0][dim] >= reach:
            groups.append([])
        groups[-1].append(box)
        reach = max(reach, box[0][dim] + box[1][dim])
    return groups


def cover_fault(global_shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why the boxes do not cover every element of the tensor exactly once; None if they do."""
    for box in boxes:
        if not inside(box, global_shape):
            return f"a chunk at {list(box[0])} of shape {list(box[1])} is outside shape {list(global_shape)}"
    filled = [box for box in boxes if volume(box)]
    if pair := find_overlap(filled):
        (a, a_shape), (b, b_shape) = pair
        return (
            f"elements are doubled: the chunk at {list(a)} of shape {list(a_shape)} "
            f"overlaps the one at {list(b)} of shape {list(b_shape)}"
        )
    total, covered = math.prod(global_shape), sum(volume(box) for box in filled)
    if covered == total:
        return None
    where = _first_gap(global_shape, filled)
    return f"{total - covered} of its {total} elements are missing{where}"


def _first_gap(global_shape: Sequence[int], boxes: list[Box]) -> str:
    """The first range along dim 0 (the experts, where there are any) that disjoint boxes leave open."""
    if not global_shape:
        return ""
    change: dict[int, int] = {0: 0, global_shape[0]: 0}
    for offsets, shape in boxes:
        row = math.prod(shape[1:])
        change[offsets[0]] = change.get(offsets[0], 0) + row
        change[offsets[0] + shape[0]] = change.get(offsets[0] + shape[0], 0) - row
    edges, filled = sorted(change), 0
    for start, stop in pairwise(edges):
        filled += change[start]
        if filled < math.prod(global_shape[1:]):
            return f", the first in rows {start} to {stop - 1} of dim 0"
    return ""
