"""Learning-rate schedules, AdamW's groups, initial weights."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from parallel.engines.base import StateSlice, whole_state
from trainer.compose import compose
from trainer.config import OptimConfig, Schedule
from trainer.models.init import initialise
from trainer.optim import learning_rate, make_adamw


def test_cosine_warms_up_and_ends_at_the_minimum() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 21) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.55)
    assert rates[20] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[4:]))


def test_wsd_is_constant_until_the_decay() -> None:
    config = OptimConfig(lr=2.0, schedule=Schedule.wsd, warmup_steps=2, decay_steps=5, min_lr_ratio=0.0)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[2:15] == [2.0] * 13
    assert rates[15:] == pytest.approx([1.6, 1.2, 0.8, 0.4, 0.0])


def test_a_longer_wsd_run_shares_everything_before_the_decay() -> None:
    config = compose(["optim=wsd"]).optim
    short = [learning_rate(config, step, 100) for step in range(80)]
    assert short == [learning_rate(config, step, 500) for step in range(80)]


def test_only_matrices_are_decayed_and_state_exists_from_the_start() -> None:
    model = nn.Linear(3, 2)
    optimizer = make_adamw(list(model.named_parameters()), OptimConfig(weight_decay=0.3))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [p.dim() for group in optimizer.param_groups for p in group["params"]] == [2, 1]
    assert set(optimizer.state[model.weight]) == {"step", "exp_avg", "exp_avg_sq"}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(64, 48))
        self.norm = nn.Parameter(torch.empty(48))
        self.bias = nn.Parameter(torch.empty(48))


def test_initial_weights_depend_on_seed_name_and_place_only() -> None:
    a, b, c = Plain(), Plain(), Plain()
    initialise(a, whole_state(a), seed=1)
    half = [StateSlice("model.w", (64, 48), (32, 0), b.w.detach()[32:], True)]
    initialise(b, half, seed=1)
    assert torch.equal(a.w[32:], b.w[32:])
    initialise(c, whole_state(c), seed=2)
    assert not torch.equal(a.w, c.w)
    assert float(a.w.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert bool((a.norm == 1).all())
    assert not a.bias.any()
