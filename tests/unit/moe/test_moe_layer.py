"""The MoE layer against a loop over tokens in fp64, and each piece against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from parallel.dispatch.local import LocalDispatcher
from tests.configs import composed
from trainer.config import Machine, RunConfig, resolve
from trainer.config_moe import BiasUpdate
from trainer.moe.balance import balance_loss, entropy, load_fraction, router_z, row_counts, update_bias_
from trainer.moe.experts import Experts, grouped_linear
from trainer.moe.layer import MoeLayer
from trainer.moe.positions import Positions
from trainer.moe.router import Router


def config_of(*overrides: str) -> RunConfig:
    small = ["model.dim=16", "model.ffn_dim=24", "layout.num_experts=8"]
    return resolve(composed(*small, *overrides), Machine(num_cpus=1))


def counted(*shape: int) -> Positions:
    """Every position counts, all tokens are 0, no noise."""
    return Positions(torch.ones(shape), torch.zeros(shape, dtype=torch.int64))


def sequence_balance(p_BSE: Tensor, expert_BSK: Tensor, weight_B: Tensor) -> Tensor:
    return balance_loss(load_fraction(row_counts(expert_BSK, p_BSE.shape[-1]), p_BSE.dtype), p_BSE, weight_B)


def random_layer(config: RunConfig) -> MoeLayer:
    torch.manual_seed(0)
    layer = MoeLayer(config, LocalDispatcher())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def by_token(layer: MoeLayer, x_BSD: Tensor, capacity: int | None) -> Tensor:
    """The definition, one token and one expert at a time, in fp64. Softmax routing."""
    layout, e = layer.router.layout, layer.experts
    out = torch.zeros_like(x_BSD, dtype=torch.float64)
    batch, length, _ = x_BSD.shape
    for b in range(batch):
        taken = [0] * layout.num_experts
        for k in range(layout.top_k):
            for s in range(length):
                x = x_BSD[b, s].double()
                p = (layer.router.weight.double() @ x).softmax(-1)
                best = torch.topk(p, layout.top_k)
                weight, expert = best.values[k], int(best.indices[k])
                if layout.renormalize:
                    weight = weight / best.values.sum()
                if capacity is not None and taken[expert] >= capacity:
                    continue
                taken[expert] += 1
                assert e.w3 is not None
                hidden = torch.nn.functional.silu(x @ e.w1[expert].double()) * (x @ e.w3[expert].double())
                out[b, s] += weight * (hidden @ e.w2[expert].double())
    return out


@pytest.mark.parametrize(
    "overrides",
    [
        ["layout=mixtral"],
        ["layout=switch"],
        ["layout.capacity_factor=0.5"],
        ["layout.top_k=3", "layout.renormalize=false"],
    ],
    ids=str,
)
def test_layer_and_gradients_equal_the_definition(overrides: list[str]) -> None:
    config = config_of(*overrides)
    layer = random_layer(config)
    x = torch.randn(3, 11, 16, requires_grad=True)
    layout = config.layout
    capacity = None
    if layout.capacity_factor is not None:
        capacity = math.ceil(layout.capacity_factor * 11 * layout.top_k / layout.num_experts)
    y, stats = layer(x, counted(3, 11))
    expected = by_token(layer, x, capacity)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    if capacity is not None:
        assert int(stats.dropped) > 0, "the case must drop"
    probe = torch.randn_like(y)
    wanted = torch.autograd.grad((expected * probe).sum(), [x, *layer.parameters()])
    found = torch.autograd.grad((y * probe).sum(), [x, *layer.parameters()])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


def test_capacity_counts_by_row_so_a_row_alone_drops_the_same() -> None:
    layer = random_layer(config_of("layout=switch", "layout.capacity_factor=0.6"))
    x = torch.randn(4, 9, 16)
    together, _ = layer(x, counted(4, 9))
    alone = torch.cat([layer(row[None], counted(1, 9))[0] for row in x])
    torch.testing.assert_close(together, alone)


def test_shared_experts_are_added() -> None:
    config = config_of("layout.num_shared_experts=2")
    layer = random_layer(config)
    x = torch.randn(2, 5, 16)
    with_shared, _ = layer(x, counted(2, 5))
    assert layer.shared is not None
    assert layer.shared.w1.weight.shape == (2 * config.layout.expert_ffn_dim, 16)
    shared = layer.shared
    layer.shared = None
    torch.testing.assert_close(with_shared, layer(x, counted(2, 5))[0] + shared(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [24, 6])
def test_grouped_linear_equals_a_loop(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    sizes = [3, 0, 5, 0]
    x = torch.randn(8, 16, dtype=dtype, requires_grad=True)
    w = torch.randn(4, 16, width, dtype=dtype, requires_grad=True)
    y = grouped_linear(x, w, torch.tensor(sizes).cumsum(0).int())
    expected = torch.cat([part @ w[i] for i, part in enumerate(x.split(sizes))])
    torch.testing.assert_close(y, expected)
    for found, wanted in zip(
        torch.autograd.grad(y.sum(), [x, w]), torch.autograd.grad(expected.sum(), [x, w]), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_experts_without_rows() -> None:
    experts = Experts(4, 16, 24, config_of().model.activation)
    with torch.no_grad():
        for p in experts.parameters():
            p.normal_()
    y = experts(torch.empty(0, 16), torch.zeros(4, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (0, 16)
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


def test_balance_loss_is_one_when_even_and_larger_when_not() -> None:
    even = torch.full((2, 8, 4), 0.25)
    choices = torch.arange(8).remainder(4).expand(2, 8)[..., None].contiguous()
    weights = torch.tensor([3.0, 5.0])
    assert float(sequence_balance(even, choices, weights)) == pytest.approx(8.0)
    skewed = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(2, 8, 4).contiguous()
    assert float(sequence_balance(skewed, torch.zeros_like(choices), weights)) == pytest.approx(8 * 4 * 0.7)


def test_balance_loss_follows_the_paper() -> None:
    torch.manual_seed(1)
    p = torch.rand(3, 7, 5).softmax(-1).double()
    choices = torch.stack([torch.randperm(5)[:2] for _ in range(21)]).view(3, 7, 2)
    weights = torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64)
    expected = 0.0
    for b in range(3):
        for i in range(5):
            f = 5 / (2 * 7) * sum(int(i in choices[b, s]) for s in range(7))
            expected += float(weights[b]) * f * float(p[b, :, i].mean())
    assert float(sequence_balance(p, choices, weights)) == pytest.approx(expected)


def test_z_loss_and_entropy_follow_their_formulas() -> None:
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    weight = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    z = (logits.exp().sum(-1).log() ** 2 * weight).sum()
    assert float(router_z(logits, weight)) == pytest.approx(float(z))
    p = logits.softmax(-1)
    assert float(entropy(p, weight)) == pytest.approx(float((-(p * p.log()).sum(-1) * weight).sum()))


def test_bias_moves_against_the_load() -> None:
    bias = torch.zeros(4)
    update_bias_(bias, torch.tensor([10, 2, 6, 6]), 0.01, BiasUpdate.sign)
    assert bias.tolist() == pytest.approx([-0.01, 0.01, 0.0, 0.0])
    update_bias_(bias, torch.tensor([12, 0, 6, 6]), 0.01, BiasUpdate.proportional)
    assert bias.tolist() == pytest.approx([-0.02, 0.02, 0.0, 0.0])


def test_sigmoid_bias_changes_the_choice_and_not_the_weight() -> None:
    config = config_of("layout=deepseek", "layout.num_experts=8", "layout.top_k=2")
    router = Router(16, config.layout)
    torch.manual_seed(0)
    with torch.no_grad():
        router.weight.normal_()
    x = torch.randn(1, 6, 16)
    before, *_ = router(x, counted(1, 6))
    assert router.bias_E is not None
    router.bias_E[5] = 10.0
    after, *_ = router(x, counted(1, 6))
    assert bool((after.expert_TK == 5).any(1).all()), "a large bias draws every token"
    scores = torch.sigmoid(x @ router.weight.detach().T)[0]
    chosen = scores.gather(1, after.expert_TK)
    torch.testing.assert_close(after.weight_TK, chosen / chosen.sum(1, keepdim=True))
    assert not torch.equal(before.expert_TK, after.expert_TK)


def test_group_limited_routing_stays_in_the_best_groups() -> None:
    config = config_of(
        "layout=deepseek",
        "layout.num_experts=8",
        "layout.top_k=3",
        "layout.num_groups=4",
        "layout.top_groups=2",
    )
    router = Router(16, config.layout)
    torch.manual_seed(0)
    with torch.no_grad():
        router.weight.normal_()
    x = torch.randn(2, 10, 16)
    routing, *_ = router(x, counted(2, 10))
    scores = torch.sigmoid(x @ router.weight.detach().T).flatten(0, 1)
    for token, chosen in zip(scores, routing.expert_TK.tolist(), strict=True):
        groups = token.view(4, 2).sum(1).topk(2).indices.tolist()
        allowed = [e for e in range(8) if e // 2 in groups]
        best = sorted(allowed, key=lambda e: -float(token[e]))[:3]
        assert sorted(chosen) == sorted(best)


def test_router_is_fp32_whatever_the_activations_are() -> None:
    config = config_of()
    router = Router(16, config.layout)
    torch.manual_seed(0)
    with torch.no_grad():
        router.weight.normal_()
    x = torch.randn(1, 200, 16).bfloat16()
    low, *_ = router(x, counted(1, 200))
    high, *_ = router(x.float(), counted(1, 200))
    assert low.weight_TK.dtype == torch.float32
    assert torch.equal(low.expert_TK, high.expert_TK)
    assert torch.equal(low.weight_TK, high.weight_TK)
