"""Losses and log-likelihoods against ones computed token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from parallel.errors import ConfigError
from tests.configs import composed
from trainer.build import Inference, build_model
from trainer.config import Machine, RunConfig, resolve
from trainer.data.sources import draw
from trainer.data.tokenizer import TextTokenizer
from trainer.draws import Sampling
from trainer.evaluation import documents_loss, log_likelihoods
from trainer.generation import complete, dropless
from trainer.harness import Answers, rolling_windows
from trainer.models.init import fill_buffers, initialise

CPU = torch.device("cpu")
TEXTS = ["the cat sat on the mat", "a dog", "the mat sat on the cat, and then the cat sat on it. " * 3]
CONTEXT = 16


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(TEXTS, 280)


def config_of(*overrides: str) -> RunConfig:
    sizes = ["model.dim=32", "model.num_layers=2", "model.ffn_dim=48", "model.init_std=0.2", "device=cpu"]
    batch = [f"train.seq_len={CONTEXT}", "train.micro_batch=2", "train.global_batch=2"]
    return resolve(composed(*sizes, *batch, "model.vocab_size=280", *overrides), Machine(num_cpus=1))


def small_model(config: RunConfig) -> nn.Module:
    torch.set_num_threads(1)
    model = build_model(config, LocalDispatcher()).to_empty(device=CPU)
    initialise(model, whole_state(model), seed=0)
    fill_buffers(model)
    return model.eval()


@pytest.fixture(scope="module")
def inference(tokenizer: TextTokenizer) -> Inference:
    config = config_of("layout=switch", "layout.capacity_factor=0.5")
    checkpoint: Any = None  # none is read here
    return Inference(config, small_model(config), tokenizer, CPU, checkpoint)


@torch.no_grad()
def one_by_one(model: nn.Module, before: list[int], after: list[int]) -> tuple[float, bool]:
    """log p of the tokens, each from a call of its own that reads at most ``CONTEXT`` tokens."""
    total, greedy = 0.0, True
    known = list(before)
    for token in after:
        row = model(torch.tensor([known]))[0, -1].double().log_softmax(-1)
        total += float(row[token])
        greedy = greedy and int(row.argmax()) == token
        known.append(token)
    return total, greedy


def test_log_likelihoods(inference: Inference) -> None:
    model = inference.model
    with dropless(model):
        (likeliest,) = complete(model, [[3, 4, 5]], Sampling(3, 0.0), eos=-1, context=CONTEXT, device=CPU)
        pairs = [([3, 4, 5], likeliest.tokens), ([3, 4, 5], [9, 9, 9]), ([1], [2] * 15), ([7] * 6, [8])]
        expected = [one_by_one(model, *pair) for pair in pairs]
    for batch_size in (1, 3):
        found = log_likelihoods(model, pairs, context=CONTEXT, device=CPU, batch_size=batch_size)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert expected[0][1] and not expected[1][1]
    long_context = [5] * 40
    (cut, whole) = log_likelihoods(
        model, [(long_context, [6, 7]), ([5] * 15, [6, 7])], context=CONTEXT, device=CPU
    )
    assert cut[0] == pytest.approx(whole[0], abs=1e-4), "the oldest tokens are left out"


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_rolling_windows_predict_each_token_once(length: int) -> None:
    tokens = list(range(1, length + 1))
    windows = rolling_windows(tokens, 0, CONTEXT)
    assert [token for _, after in windows for token in after] == tokens
    whole = [0, *tokens]
    for before, after in windows:
        assert len(before) >= 1 and len(before) + len(after) <= CONTEXT + 1
        at = whole.index(before[0])
        assert whole[at : at + len(before) + len(after)] == before + after
    if length > CONTEXT:
        assert len(windows[-1][0]) + len(windows[-1][1]) == CONTEXT + 1, (
            "the last one has all the context there is"
        )


@dataclass
class Asked:
    """A request as the harness makes them."""

    args: tuple[Any, ...]


def test_what_the_harness_asks(inference: Inference) -> None:
    answers, tokenizer = Answers(inference, batch_size=2), inference.tokenizer
    encode, eos = tokenizer.encode, tokenizer.eos
    found = answers.loglikelihood(
        [
            Asked(("the cat ", "sat")),
            Asked(("the cat", " sat")),
            Asked(("", "the dog")),
            Asked(("the cat", " dog")),
        ]
    )
    whole, before = encode("the cat sat"), encode("the cat")
    assert whole[: len(before)] == before
    direct = log_likelihoods(
        inference.model,
        [(before, whole[len(before) :]), ([eos], encode("the dog"))],
        context=CONTEXT,
        device=CPU,
    )
    assert [value for value, _ in found[:3]] == pytest.approx(
        [direct[0][0], direct[0][0], direct[1][0]], abs=1e-4
    )
    assert found[3][0] != pytest.approx(found[1][0], abs=1e-2)

    (rolled,) = answers.loglikelihood_rolling([Asked((TEXTS[2],))])
    windows = rolling_windows(encode(TEXTS[2]), eos, CONTEXT)
    assert len(windows) > 2
    parts = log_likelihoods(inference.model, windows, context=CONTEXT, device=CPU)
    assert rolled == pytest.approx(sum(value for value, _ in parts), abs=1e-3)

    greedy = {"until": [], "max_gen_toks": 12}
    (free,) = answers.generate_until([Asked(("the cat", greedy))])
    assert len(free) > 3
    stop = free[2:4]
    drawn = {"until": stop, "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    stopped, other, short = answers.generate_until(
        [
            Asked(("the cat", {**greedy, "until": [stop]})),
            Asked(("the cat", drawn)),
            Asked(("the cat", {**greedy, "max_gen_toks": 1})),
        ]
    )
    assert stopped == free[: free.index(stop)]
    assert stop not in other and free.startswith(short) and len(encode(short)) <= 2
    with pytest.raises(ConfigError, match="longer than what the model reads"):
        answers.loglikelihood([Asked(("a", TEXTS[2]))])


@torch.no_grad()
def test_documents_are_packed_to_their_last_token(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt").write_text(text)
    config = config_of("layout=mixtral", "data=text", f"data.path={tmp_path}", "eval.max_rows=1000")
    model = small_model(config)
    found = documents_loss(model, tokenizer, config, 1.0, CPU)
    total, count = 0.0, 0
    stream: list[int] = [token for text in TEXTS for token in [*tokenizer.encode(text), tokenizer.eos]]
    for start in range(0, len(stream) - 1, CONTEXT):
        row = stream[start : start + CONTEXT + 1]
        for document in _documents(row, tokenizer.eos):
            if len(document) > 1:
                logits = document_logits(model, row, document)
                total += float(F.cross_entropy(logits, torch.tensor(document[1:]), reduction="sum"))
                count += len(document) - 1
    assert found.num_tokens == count
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) * len(stream) / num_bytes)
    assert found.num_rows == math.ceil((len(stream) - 1) / CONTEXT) and found.complete

    config.eval.max_rows = 2
    first = documents_loss(model, tokenizer, config, 1.0, CPU)
    assert (first.num_rows, first.complete) == (2, False) and first.num_tokens < found.num_tokens
    lowest, above = sorted((draw(f"{index}.txt"), index) for index in range(len(TEXTS)))[:2]
    held_out = documents_loss(
        model, tokenizer, config_of("data=text", f"data.path={tmp_path}"), above[0], CPU
    )
    one = config_of("data=text", f"data.path={tmp_path / f'{lowest[1]}.txt'}")
    assert held_out == documents_loss(model, tokenizer, one, 1.0, CPU)
    with pytest.raises(ConfigError, match="holds no text"):
        documents_loss(model, tokenizer, config, 0.0, CPU)


def _documents(row: list[int], eos: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in row:
        parts[-1].append(token)
        if token == eos:
            parts.append([])
    return parts


def document_logits(model: nn.Module, row: list[int], document: list[int]) -> Tensor:
    """Logits for a document's targets, the document alone at the positions it has in its row."""
    at = next(i for i in range(len(row)) if row[i : i + len(document)] == document)
    width = at + len(document) - 1
    ids = torch.tensor([[0] * at + [1] * (len(document) - 1)])
    tokens = torch.tensor([row[:width]])
    return model(tokens, None, ids)[0, at:]
