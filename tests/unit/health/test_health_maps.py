"""Pairs and domains against counting by hand; the report's ratios of them."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from trainer.data.batch import Batch
from trainer.health import maps
from trainer.health.maps import RoutingMaps
from trainer.metrics.health import closest_pairs, domain_ratios, mutual_information, pair_ratios
from trainer.moe.balance import MoeStats


def stats(expert_BSK: torch.Tensor, num_experts: int) -> MoeStats:
    counts = torch.bincount(expert_BSK.flatten(), minlength=num_experts + 1)[:num_experts]
    zero = torch.zeros(())
    return MoeStats(zero, zero, zero, zero, counts, zero, zero, zero, expert_BSK)


def batch(sample_ids: list[int], length: int) -> Batch:
    tokens = torch.zeros(len(sample_ids), length, dtype=torch.int64)
    return Batch(tokens, tokens, tokens.int(), torch.tensor(sample_ids))


def choices(shape: tuple[int, int], k: int, num_experts: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(*shape, num_experts, generator=generator).argsort(-1)[..., :k]
    found[0, 0, 0] = num_experts  # none
    return found


def test_counts_of_pairs_and_domains_are_those_by_hand() -> None:
    num_experts, k, shape = 6, 3, (3, 5)
    found = RoutingMaps(["other", "a", "b"])
    pairs: list[Counter[tuple[int, int]]] = [Counter(), Counter()]
    domains = np.zeros((2, 3, num_experts), int)
    for micro in range(2):
        layers = [choices(shape, k, num_experts, 10 * micro + layer) for layer in range(2)]
        domain = torch.randint(3, shape, generator=torch.Generator().manual_seed(micro))
        ids = [4, -1, 7]  # the second row only fills up the batch
        found.add([stats(x, num_experts) for x in layers], batch(ids, shape[1]), domain)
        for layer, chosen in enumerate(layers):
            for row in (0, 2):
                for position in range(shape[1]):
                    real = [int(e) for e in chosen[row, position] if e < num_experts]
                    pairs[layer].update(combinations(sorted(real), 2))
                    for expert in real:
                        domains[layer, domain[row, position], expert] += 1
    record = found.record([1, 4])
    assert record["layers"] == [1, 4] and record["domains"] == ["other", "a", "b"]
    assert record["domain_counts"] == domains.tolist()
    assert record["counts"] == domains.sum(1).tolist()
    for written, expected in zip(record["pair_counts"], pairs, strict=True):
        assert written == [expected[pair] for pair in combinations(range(num_experts), 2)]


def test_only_the_most_frequent_pairs_of_many_experts_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "MAX_PAIRS", 3)
    monkeypatch.setattr(maps, "MAX_EXPERTS", 5)
    found = RoutingMaps()
    expert = torch.tensor([[[0, 1], [0, 1], [2, 3], [2, 3], [2, 3], [4, 5], [0, 5], [0, 5]]])
    found.add([stats(expert, 6)], batch([0], 8))
    assert found.record([0])["pairs"] == [[[2, 3, 3], [0, 1, 2], [0, 5, 2]]]


def test_one_choice_a_token_has_no_pairs() -> None:
    found = RoutingMaps()
    found.add([stats(torch.tensor([[[0], [1]]]), 2)], batch([0], 2))
    assert found.record([0]).keys() == {"layers", "num_experts", "top_k", "counts"}
    dense = RoutingMaps()
    dense.add([], batch([0], 2))
    assert dense.record([]) == {}


def test_pairs_by_chance_have_the_ratio_one() -> None:
    counts = [10, 20, 30]  # pairs in proportion to the product of the loads
    pairs = [2 * counts[i] * counts[j] for i, j in combinations(range(3), 2)]
    record = {"layers": [0], "num_experts": 3, "top_k": 2, "counts": [counts], "pair_counts": [pairs]}
    [(_, ratio)] = pair_ratios(record)
    assert np.isnan(np.diag(ratio)).all()
    np.testing.assert_allclose(ratio[~np.eye(3, dtype=bool)], 1.0)
    [(_, ratio)] = pair_ratios({**record, "pair_counts": [[400, 0, 0]]})
    assert ratio[0, 2] == 0.0 and ratio[1, 0] == pytest.approx(11 / 2)
    assert closest_pairs(ratio, 1) == [(0, 1, pytest.approx(11 / 2))]


def test_a_pair_that_was_not_written_may_have_any_number() -> None:
    record = {"layers": [0], "num_experts": 3, "top_k": 2, "counts": [[10, 20, 30]], "pairs": [[[0, 1, 20]]]}
    [(_, ratio)] = pair_ratios(record)
    assert math.isnan(ratio[0, 2]) and ratio[0, 1] == pytest.approx(20 / (30 * 2 / 11))


def test_bits_tell_whether_experts_care_for_domains() -> None:
    assert mutual_information(np.array([[5.0, 5.0], [10.0, 10.0]])) == pytest.approx(0.0)
    assert mutual_information(np.array([[8.0, 0.0], [0.0, 8.0]])) == pytest.approx(1.0)
    record = {"layers": [2], "domains": ["other", "a", "b"], "domain_counts": [[[0, 0], [6, 2], [4, 4]]]}
    names, [(layer, ratio, bits)] = domain_ratios(record)
    assert names == ["a 50%", "b 50%"] and layer == 2 and 0 < bits < 1
    np.testing.assert_allclose(ratio, [[0.75 / 0.625, 0.25 / 0.375], [0.5 / 0.625, 0.5 / 0.375]])
