"""Contestants timed in turn, so that all see the same load of the machine, and what their ratios are worth."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch


def in_turn(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    before: Callable[[int, str], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; every round begins with another one.

    Args:
        before: called with the round and the contestant before its turn; not timed.
    """
    names, seconds = list(contestants), {name: [0.0] * rounds for name in contestants}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            if before is not None:
                before(index, name)
            _finish(device)
            began = time.perf_counter()
            contestants[name]()
            _finish(device)
            seconds[name][index] = time.perf_counter() - began
    return seconds


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of their median (bootstrap, percentiles of 2,000 draws)."""
    dice = random.Random(0)
    medians = sorted(median(dice.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def ratio(these: Sequence[float], those: Sequence[float]) -> tuple[float, float, float]:
    """Median over rounds of ``these / those``, and its 95 % interval."""
    ratios = [a / b for a, b in zip(these, those, strict=True)]
    return median(ratios), *interval(ratios)
