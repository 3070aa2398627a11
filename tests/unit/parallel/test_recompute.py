"""Activation checkpointing replays what was recorded instead of deciding again."""

import torch
from torch import Tensor

from parallel.recompute import recomputed, recorded


def test_recorded_values_are_replayed_in_order() -> None:
    calls: list[str] = []

    def decide(name: str) -> Tensor:
        calls.append(name)
        return torch.tensor(float(len(calls)))

    def function(x: Tensor) -> Tensor:
        first = recorded(lambda: decide("first"))
        second = recorded(lambda: decide("second"))
        return (x.sin() * first).cos() * second

    x = torch.tensor(0.3, requires_grad=True)
    y = recomputed(function, x)
    (gradient,) = torch.autograd.grad(y, x)
    assert calls == ["first", "second"], "backward must not decide again"
    z = torch.tensor(0.3, requires_grad=True)
    (expected,) = torch.autograd.grad((z.sin() * 1.0).cos() * 2.0, z)
    assert torch.equal(gradient, expected)


def test_the_rest_is_computed_again() -> None:
    runs = []

    def function(x: Tensor) -> Tensor:
        runs.append(1)
        return x.sin().cos()

    recomputed(function, torch.tensor(1.0, requires_grad=True)).backward()
    assert len(runs) == 2


def test_outside_a_recomputation_nothing_is_kept() -> None:
    assert [recorded(lambda: 1), recorded(lambda: 2)] == [1, 2]


def test_a_second_backward_over_a_kept_graph_replays_again() -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        factor = recorded(lambda: calls.append(1) or torch.tensor(3.0))
        return (x * factor).sin()

    x = torch.tensor(0.2, requires_grad=True)
    y = recomputed(function, x)
    first = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.autograd.grad(y, x) == first
    assert len(calls) == 1


def test_nested_recomputations_decide_once() -> None:
    calls = []

    def inner(x: Tensor) -> Tensor:
        return x.sin() * recorded(lambda: calls.append(1) or torch.tensor(2.0))

    x = torch.tensor(0.2, requires_grad=True)
    recomputed(lambda x: recomputed(inner, x).cos(), x).backward()
    assert len(calls) == 1
