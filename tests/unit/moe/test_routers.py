"""Every router, capacity rule and balance loss against a second, straightforward definition in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallel.dispatch.local import LocalDispatcher
from tests.configs import composed
from tests.unit.moe import reference
from trainer.config import Machine, RunConfig, parallel_dims, resolve
from trainer.moe import choice
from trainer.moe.layer import MoeLayer
from trainer.moe.noise import sample_keys, uniform
from trainer.moe.positions import Positions
from trainer.moe.replay import replaying
from trainer.rules import validate

SMALL = ["device=cpu", "model.dim=16", "model.ffn_dim=24", "train.num_threads=1"]
E8 = ["layout.num_experts=8", "layout.expert_ffn_dim=12"]
LAYOUTS = {
    "switch": ["layout=switch", *E8],
    "gshard": ["layout=gshard", *E8, "layout.sample_second=false", "layout.capacity_factor=0.8"],
    "mixtral": ["layout=mixtral", *E8],
    "deepseek": ["layout=deepseek", *E8, "layout.top_k=3", "layout.route_scale=2.5"],
    "group-limited": ["layout=deepseek", *E8, "layout.top_k=3", "layout.num_groups=4", "layout.top_groups=2"],
    "qwen3_moe": ["layout=qwen3_moe", *E8],
    "olmoe": ["layout=olmoe", *E8],
    "hierarchical": ["layout=hierarchical", *E8],
    "one group of four": ["layout=hierarchical", *E8, "layout.top_groups=1", "layout.top_k=2"],
    "expert_choice": ["layout=expert_choice", *E8],
    "expert_choice, few places": ["layout=expert_choice", *E8, "layout.capacity_factor=0.2"],
    "expert_choice, weights divided": ["layout=expert_choice", *E8, "layout.renormalize=true"],
    "ernie": [
        *("layout=ernie", "layout.num_experts=9", "layout.expert_ffn_dim=12"),
        "layout.expert_sizes=[{num: 6, ffn_dim: 12}, {num: 3, ffn_dim: 20}]",
    ],
    "skywork": ["layout=skywork", *E8, "layout.logit_norm=1.5"],
    "moe_plus_plus": ["layout=moe_plus_plus"],
    "zero and copy experts with a capacity": ["layout=moe_plus_plus", "layout.capacity_factor=0.6"],
    "sinkhorn": ["layout=sinkhorn", *E8],
    "sinkhorn, two of them": ["layout=sinkhorn", *E8, "layout.top_k=2", "layout.score=softmax"],
    "hash": ["layout=hash", *E8],
    "hash, two of them": ["layout=hash", *E8, "layout.top_k=2"],
    "shared gate": ["layout=mixtral", *E8, "layout.num_shared_experts=2", "layout.shared_gate=true"],
    "drop by score": [
        *("layout=gshard", *E8, "layout.sample_second=false"),
        *("layout.capacity_factor=0.6", "layout.drop_by=score"),
    ],
    "balance over the forward pass": ["layout=mixtral", *E8, "layout.balance.scope=micro"],
    "balance by the step before": ["layout=mixtral", *E8, "layout.balance.scope=step"],
}
BATCH, LENGTH = 2, 9


def config_of(*overrides: str) -> RunConfig:
    config = resolve(composed(*SMALL, *overrides), Machine(num_cpus=1))
    validate(config)
    return config


def random_layer(config: RunConfig) -> MoeLayer:
    torch.manual_seed(0)
    layer = MoeLayer(config, LocalDispatcher(), layer=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        if layer.router.bias_E is not None:
            layer.router.bias_E.normal_(std=0.2)
        if layer.router.load_E is not None:
            layer.router.load_E.copy_(torch.arange(layer.router.num_choosable) * 3)
    return layer


def inputs() -> tuple[Tensor, Positions]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, LENGTH, 16, generator=g).requires_grad_()
    counted = (torch.rand(BATCH, LENGTH, generator=g) < 0.7).float()
    return x, Positions(counted, torch.randint(0, 50, (BATCH, LENGTH), generator=g))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layer_its_gradients_and_sums_equal_the_definition(name: str) -> None:
    layer = random_layer(config_of(*LAYOUTS[name]))
    x, positions = inputs()
    y, stats = layer(x, positions)
    expected = reference.run(layer, x, positions.tokens_BS, positions.counted_BS)
    none = layer.router.num_choosable
    found = [[[e for e in token if e < none] for token in row] for row in stats.expert_BSK.tolist()]
    assert [[sorted(t) for t in r] for r in found] == [[sorted(t) for t in r] for r in expected.chosen]
    torch.testing.assert_close(y.double(), expected.y_BSD, rtol=1e-5, atol=1e-5)
    assert stats.counts_E.tolist() == expected.counts
    assert (int(stats.dropped), int(stats.unserved)) == (expected.dropped, expected.unserved)
    for term in ("balance", "router_z", "entropy", "confidence"):
        wanted = pytest.approx(float(torch.as_tensor(getattr(expected, term)).detach()), rel=1e-5)
        assert float(getattr(stats, term).detach()) == wanted, term
    probe = torch.randn_like(y)
    ours = (y * probe).sum() + 3.0 * stats.balance + 0.1 * stats.router_z
    wanted = (expected.y_BSD * probe).sum() + 3.0 * expected.balance + 0.1 * expected.router_z
    leaves = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours, leaves, allow_unused=True),
        torch.autograd.grad(wanted, leaves, allow_unused=True),
        strict=True,
    ):
        a = torch.zeros(()) if a is None else a
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


def test_the_cases_drop_and_leave_out_what_they_are_about() -> None:
    def stats_of(name: str):  # type: ignore[no-untyped-def]
        return random_layer(config_of(*LAYOUTS[name]))(*inputs())[1]

    assert int(stats_of("gshard").dropped) > 0
    assert int(stats_of("drop by score").dropped) > 0
    assert int(stats_of("expert_choice, few places").unserved) > 0, "no expert picked some token"
    real = 8
    assert int(stats_of("moe_plus_plus").counts_E[real:].sum()) > 0, "some tokens skip the experts"


def test_drop_by_score_keeps_the_heaviest() -> None:
    by_score = random_layer(config_of(*LAYOUTS["drop by score"]))
    by_position = random_layer(config_of(*LAYOUTS["drop by score"], "layout.drop_by=position"))
    kept = []
    for layer in (by_score, by_position):
        routing = layer.router(*inputs()).routing
        kept.append(routing.weight_TK[routing.slot_TK >= 0].sum())
    assert kept[0] > kept[1]


def test_sinkhorn_is_even_in_training_and_plain_outside_of_it() -> None:
    layer = random_layer(config_of("layout=sinkhorn", "layout.num_experts=4", "layout.expert_ffn_dim=12"))
    g = torch.Generator().manual_seed(3)
    x = torch.randn(1, 64, 16, generator=g)
    positions = Positions(torch.ones(1, 64), torch.zeros(1, 64, dtype=torch.int64))
    with torch.no_grad():
        layer.router.weight[0] += 2.0 * x.mean((0, 1)) / x.mean((0, 1)).norm()
    trained = layer.router(x, positions).stats
    plain = layer.eval().router(x, positions).stats
    assert torch.equal(plain.expert_BSK[..., 0], (x @ layer.router.weight.T).argmax(-1))
    assert trained.counts_E.max() < plain.counts_E.max()


def test_a_hierarchical_token_visits_top_groups_groups_with_equal_shares() -> None:
    config = config_of("layout=hierarchical")
    stats = random_layer(config).router(*inputs()).stats
    group = stats.expert_BSK // (config.layout.num_experts // config.layout.num_groups)
    for token in group.flatten(0, 1).tolist():
        assert sorted(token.count(g) for g in set(token)) == [2, 2]


def test_what_a_position_gets_depends_on_later_ones() -> None:
    """The caveats of docs/layouts.md, shown: a change behind a position changes what it gets, or does not."""
    for name, factor, leaks in (
        ("expert_choice", -3.0, True),
        ("gshard", -3.0, True),  # second choices get places after all first ones
        ("drop by score", 3.0, True),
        ("sinkhorn", -3.0, True),
        ("mixtral", -3.0, False),
        ("switch", -3.0, False),
        ("switch", 3.0, False),
    ):
        layer = random_layer(config_of(*LAYOUTS[name]))
        x, positions = inputs()
        y, _ = layer(x, positions)
        changed = x.detach().clone()
        changed[:, LENGTH // 2 :] *= factor
        z, _ = layer(changed, positions)
        same = torch.allclose(y[:, : LENGTH // 2], z[:, : LENGTH // 2])
        assert same is not leaks, name


def test_hash_is_even_over_a_vocabulary_and_never_draws_one_expert_twice() -> None:
    drawn = choice.hashed(torch.arange(32768)[None], num_experts=8, k=2, layer=0)
    counts = torch.bincount(drawn.flatten(), minlength=8).double()
    assert float(counts.max() / counts.mean()) < 1.05
    assert bool((drawn[..., 0] < 4).all()) and bool((drawn[..., 1] >= 4).all())
    assert not torch.equal(drawn, choice.hashed(torch.arange(32768)[None], 8, 2, layer=1))


def test_noise_is_uniform_and_keyed_by_sample_purpose_and_seed() -> None:
    keys = sample_keys(torch.tensor([5, 6]), seed=1)
    first = uniform(keys, "a", 4000)
    assert float(first.min()) >= 0.0 and float(first.max()) < 1.0
    assert float(first.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(first.var()) == pytest.approx(1 / 12, abs=0.005)
    assert torch.equal(first[1], uniform(keys[1:], "a", 4000)[0]), "a row alone draws the same"
    for other in (uniform(keys, "b", 4000), uniform(sample_keys(torch.tensor([5, 6]), 2), "a", 4000)):
        assert abs(float(torch.corrcoef(torch.stack([first[0], other[0]]))[0, 1])) < 0.06
    assert abs(float(torch.corrcoef(first)[0, 1])) < 0.06


def test_jitter_moves_the_scores_in_training_only() -> None:
    layer = random_layer(config_of(*LAYOUTS["mixtral"], "layout.jitter=0.2"))
    x, positions = inputs()
    noisy = positions._replace(key_B=sample_keys(torch.arange(BATCH), 0))
    plain = layer.router(x, positions).routing.weight_TK
    jittered = layer.router(x, noisy).routing.weight_TK
    assert not torch.equal(plain, jittered)
    assert torch.equal(jittered, layer.router(x, noisy).routing.weight_TK)
    assert torch.equal(plain, layer.eval().router(x, noisy).routing.weight_TK)


def test_the_second_expert_is_used_with_twice_its_weight() -> None:
    layer = random_layer(
        config_of(*LAYOUTS["gshard"], "layout.sample_second=true", "layout.capacity_factor=null")
    )
    g = torch.Generator().manual_seed(2)
    x = torch.randn(8, 500, 16, generator=g)
    positions = Positions(
        torch.ones(8, 500), torch.zeros(8, 500, dtype=torch.int64), sample_keys(torch.arange(8), 0)
    )
    routing = layer.router(x, positions).routing
    second, used = routing.weight_TK[:, 1].detach(), routing.expert_TK[:, 1] < 8
    assert bool((routing.expert_TK[:, 0] < 8).all()), "the first always travels"
    assert float(used.float().mean()) == pytest.approx(float((2 * second).clamp(max=1).mean()), abs=0.03)
    low, high = second < second.median(), second >= second.median()
    assert used[low].float().mean() < used[high].float().mean()
    everyone = layer.eval().router(x, positions).routing
    assert bool((everyone.expert_TK < 8).all()), "outside of training nothing is left out"


def test_replayed_choices_take_the_place_of_the_routers_own() -> None:
    layer = random_layer(config_of(*LAYOUTS["mixtral"]))
    x, positions = inputs()
    given = (layer.router(x, positions).stats.expert_BSK + 1) % 8
    with replaying([given]):
        routed = layer.router(x, positions)
    assert torch.equal(routed.stats.expert_BSK, given)
    p = (x @ layer.router.weight.T).softmax(-1).gather(-1, given)
    torch.testing.assert_close(routed.routing.weight_TK.view_as(p), p / p.sum(-1, keepdim=True))
    with replaying([]), pytest.raises(AssertionError, match="fewer layers"):
        layer.router(x, positions)


def test_sized_experts_divide_each_size_among_the_ep_ranks() -> None:
    config = config_of("layout=ernie", "launcher.nproc_per_node=4", "parallel.ep=4")
    assert parallel_dims(config).ep == 4
    assert sum(size.num for size in config.layout.expert_sizes) == config.layout.num_experts == 24
