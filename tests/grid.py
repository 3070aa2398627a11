"""Which cases of a grid `make test` runs; `make test-all` runs all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def grid(*axes: Iterable[Any]) -> list[Any]:
    """Parameters: every combination of a value of each axis. Those that have each value once are not ``long``.

    A value that is a tuple stands for several arguments.
    """
    values = [list(axis) for axis in axes]
    number = max(map(len, values))
    short = {tuple(index % len(axis) for axis in values) for index in range(number)}
    places = itertools.product(*(range(len(axis)) for axis in values))
    return [
        _param([axis[i] for axis, i in zip(values, place, strict=True)], place in short) for place in places
    ]


def some(cases: Sequence[Any], short: Iterable[Any]) -> list[Any]:
    """Parameters: the cases, of which all but the ``short`` ones are ``long``."""
    kept = list(short)
    assert all(case in cases for case in kept), "no such case"
    return [_param([case], case in kept) for case in cases]


def _param(values: Sequence[Any], is_short: bool) -> Any:
    flat = itertools.chain.from_iterable(value if isinstance(value, tuple) else (value,) for value in values)
    return pytest.param(*flat, marks=() if is_short else pytest.mark.long)
