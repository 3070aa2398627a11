"""The rolling window against plain arithmetic, and its state."""

from __future__ import annotations

import json
import math

import pytest
import torch
from health_helpers import totals

from trainer.health.window import Window


def test_it_is_the_weighted_mean_of_all_steps() -> None:
    window = Window(num_steps=4, num_tokens=10)
    assert window.empty
    loads = [[[8, 0], [4, 4]], [[6, 2], [4, 4]], [[0, 8], [2, 6]]]
    entropies = [[0.1, 0.6], [0.2, 0.5], [0.3, 0.4]]
    for load, entropy in zip(loads, entropies, strict=True):
        window.update(totals(load, entropy))
    reading = window.read()
    weights = [0.75**2, 0.75, 1.0]
    for layer in range(2):
        shares = [load[layer][0] / 8 for load in loads]
        expected = sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights)
        assert float(reading.share_LE[layer, 0]) == pytest.approx(expected, rel=1e-12)
        slow = [(31 / 32) ** 2, 31 / 32, 1.0]
        for found, weight in ((reading.entropy_L, weights), (reading.slow_entropy_L, slow)):
            values = [entropy[layer] for entropy in entropies]
            expected = sum(w * e for w, e in zip(weight, values, strict=True)) / sum(weight)
            assert float(found[layer]) == pytest.approx(expected, rel=1e-12)
    assert reading.confidence_L.tolist() == pytest.approx([0.5, 0.5])
    assert reading.unserved_L.tolist() == pytest.approx([0.2, 0.2])
    assert float(reading.share_LE.sum()) == pytest.approx(2.0)
    assert reading.idle_LE.tolist() == [[1, 0], [0, 0]]
    assert reading.num_steps_L.tolist() == [3, 3]


def test_effective_experts_run_from_one_to_all() -> None:
    window = Window(num_steps=4, num_tokens=8)
    window.update(totals([[8, 0, 0, 0], [2, 2, 2, 2], [4, 4, 0, 0]]))
    reading = window.read()
    assert reading.num_effective_L.tolist() == pytest.approx([1.0, 4.0, 2.0])
    assert reading.max_over_mean_L.tolist() == pytest.approx([4.0, 1.0, 2.0])


def test_it_goes_on_from_its_state_as_if_never_stopped() -> None:
    steps = [totals([[step, 7 - step], [1, 6]], [0.1 * step, 1 / 3]) for step in range(8)]
    straight, first, second = (Window(3, 7) for _ in range(3))
    for step in steps:
        straight.update(step)
    for step in steps[:4]:
        first.update(step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in steps[4:]:
        second.update(step)
    assert second.state_dict() == straight.state_dict()
    for name, value in vars(straight.read()).items():
        assert torch.equal(value, getattr(second.read(), name)), name


def test_a_step_that_is_not_finite_leaves_the_layer_as_it_was() -> None:
    window = Window(4, 8)
    window.update(totals([[6, 2], [6, 2]]))
    window.update(totals([[2, 6], [2, 6]], [math.nan, 1.0]))
    reading = window.read()
    assert float(reading.share_LE[0, 0]) == 0.75
    assert float(reading.share_LE[1, 0]) < 0.5
    assert reading.num_steps_L.tolist() == [1, 2]


def test_it_forgets_one_layer() -> None:
    window = Window(4, 8)
    window.update(totals([[8, 0], [8, 0]]))
    window.forget(0)
    window.update(totals([[4, 4], [4, 4]]))
    reading = window.read()
    assert reading.share_LE[0].tolist() == [0.5, 0.5]
    assert float(reading.share_LE[1, 0]) > 0.5
    assert reading.num_steps_L.tolist() == [1, 2]
