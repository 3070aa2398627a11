"""Texts do not depend on what stands beside them; draws are those that were asked for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from parallel.errors import ConfigError
from tests.configs import composed
from trainer.build import build_model
from trainer.config import Machine, resolve
from trainer.config_moe import LayoutConfig
from trainer.draws import Sampling, choose, prompt_keys, uniform
from trainer.generation import cache_maker, complete, dropless
from trainer.models.init import fill_buffers, initialise
from trainer.ranks import Ranks

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3], [5] * 9, [7, 8], [3, 1, 4, 1, 5], [7, 8]]


def small_model(*overrides: str) -> nn.Module:
    torch.set_num_threads(1)
    sizes = ["model.dim=32", "model.num_layers=2", "model.ffn_dim=48", "model.init_std=0.2"]
    config = resolve(composed(*sizes, "data.tokenizer.vocab_size=264", *overrides), Machine(num_cpus=1))
    model = build_model(config, LocalDispatcher()).to_empty(device=CPU)
    initialise(model, whole_state(model), seed=0)
    fill_buffers(model)
    return model.eval()


class Bigram(nn.Module):
    """A model of the user's own, without a cache; counts its calls."""

    def __init__(self, table_VV: Tensor) -> None:
        super().__init__()
        self.table_VV, self.calls = table_VV, 0

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.table_VV[tokens]


@pytest.mark.parametrize("layout", ["dense", "switch", "mixtral"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_gives_what_each_prompt_gives_alone(layout: str, temperature: float) -> None:
    model = small_model(f"layout={layout}")
    sampling = Sampling(20, temperature, top_p=0.9, seed=3)
    # 16 tokens of context: the longer texts slide, and some of them while others still fit.
    batch = complete(model, PROMPTS, sampling, eos=0, context=16, device=CPU)
    parts = complete(model, PROMPTS, sampling, eos=0, context=16, device=CPU, batch_size=2)
    alone = [complete(model, [p], sampling, eos=0, context=16, device=CPU)[0] for p in PROMPTS[:4]]
    assert batch == parts
    assert batch[:4] == alone
    assert (batch[4] == batch[2]) is (temperature == 0.0), "the same prompt again is another draw"
    assert any(len(text.tokens) == 20 for text in batch)
    other = complete(model, PROMPTS, Sampling(20, temperature, 0.9, seed=4), eos=0, context=16, device=CPU)
    assert (other == batch) is (temperature == 0.0)


@torch.no_grad()
def test_past_the_context_each_token_is_read_from_the_window_before_it() -> None:
    model = small_model("layout=mixtral")
    (text,) = complete(model, [[5, 6, 7]], Sampling(24, 0.0), eos=-1, context=12, device=CPU)
    tokens = [5, 6, 7]
    for _ in range(24):
        tokens.append(int(model(torch.tensor([tokens[-12:]]))[0, -1].argmax()))
    assert text.tokens == tokens[3:]
    long_prompt = [index % 50 for index in range(40)]
    (after_it,) = complete(model, [long_prompt], Sampling(1, 0.0), eos=-1, context=12, device=CPU)
    assert after_it.tokens == [int(model(torch.tensor([long_prompt[-12:]]))[0, -1].argmax())]


def test_texts_end_at_eos_at_a_stop_and_at_their_length() -> None:
    table = torch.full((8, 8), -50.0)
    for token in range(7):
        table[token, token + 1] = 50.0
    model = Bigram(table)
    assert cache_maker(model) is None
    stops = [None, lambda tokens: tokens[-2:] == [2, 3], None]
    found = complete(model, [[5], [0], [1]], Sampling(4, 1.0), eos=7, context=8, device=CPU, stops=stops)
    assert [(text.tokens, text.finish) for text in found] == [
        ([6], "eos"),
        ([1, 2, 3], "stop"),
        ([2, 3, 4, 5], "length"),
    ]
    assert model.calls == 4, "one for all rows that are left"


def test_nothing_is_dropped_while_text_is_written_and_the_capacity_comes_back() -> None:
    model = small_model("layout=switch", "layout.capacity_factor=0.25")
    layouts = [m.layout for m in model.modules() if isinstance(getattr(m, "layout", None), LayoutConfig)]
    tokens = torch.randint(0, 264, (2, 32), generator=torch.Generator().manual_seed(0))

    def dropped() -> int:
        losses = model(tokens, tokens)
        return sum(int(stats.dropped) for stats in losses.moe)

    assert dropped() > 0
    with dropless(model):
        assert dropped() == 0
    assert dropped() > 0 and all(layout.capacity_factor == 0.25 for layout in layouts)
    model.train()
    complete(model, PROMPTS, Sampling(2), eos=0, context=16, device=CPU)
    assert model.training and dropped() > 0


def test_a_diverged_model_is_said_to_be_one() -> None:
    table = torch.zeros(8, 8)
    table[3] = torch.nan
    with pytest.raises(ConfigError, match="it has diverged"):
        complete(Bigram(table), [[1], [3]], Sampling(4), eos=7, context=8, device=CPU)


def test_draws_are_as_frequent_as_the_model_says() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5])
    numbers = [uniform(key, 0) for key in prompt_keys([[7]] * 20_000, seed=5)]
    rows = logits.expand(len(numbers), -1)

    def shares(sampling: Sampling) -> Tensor:
        counts = Counter(choose(rows, numbers, sampling).tolist())
        return torch.tensor([counts[token] / len(numbers) for token in range(5)])

    for temperature in (0.5, 1.0, 2.0):
        expected = torch.softmax(logits / temperature, -1)
        torch.testing.assert_close(shares(Sampling(1, temperature, 1.0)), expected, atol=0.015, rtol=0)
    kept = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])  # 0.54 and 0.20 of the probability
    expected = torch.softmax(logits, -1) * kept
    expected /= expected.sum()
    for sampling in (Sampling(1, 1.0, 1.0, top_k=2), Sampling(1, 1.0, top_p=0.6)):
        found = shares(sampling)
        torch.testing.assert_close(found, expected, atol=0.015, rtol=0)
        assert found[[1, 3, 4]].sum() == 0
    assert shares(Sampling(1, 1.0, top_p=0.01)).tolist() == [1, 0, 0, 0, 0], "the likeliest is never left out"
    assert shares(Sampling(1, 0.0)).tolist() == [1, 0, 0, 0, 0]


def test_draws_differ_between_positions_prompts_and_seeds() -> None:
    keys = [*prompt_keys([[1], [2], [1]], 0), *prompt_keys([[1]], 1), *prompt_keys([[1]], -1)]
    numbers = {uniform(key, position) for key in keys for position in range(100)}
    assert len(numbers) == 500
    assert 0.45 < sum(numbers) / 500 < 0.55
    assert prompt_keys([[2], [1]], 0)[1] == prompt_keys([[1]], 0)[0]


def test_ranks_of_one_process() -> None:
    ranks = Ranks()
    assert ranks.sum(2.0, 3) == [2.0, 3.0]
    assert ranks.join(ranks.share([1, 2, 3]), 3) == [1, 2, 3]
