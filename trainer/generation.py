"""Text from a model: a batch of prompts, in one process or with a model sharded over ranks.

    prompts ─ longest first ─▶ shared out over ranks ─▶ batches of rows
                                                          │ prefill: all tokens of each row into the cache
                                                          │ then a token a row and call, finished rows leave
                                                          ▼
                                             texts, gathered on every rank

A text does not depend on what stands beside it: rows have positions of their own, draws are keyed by prompt,
and no token is dropped for want of capacity. All ranks make as many calls of the model as the one with the
longest texts; one that has none left calls it with a single token, since the others need its experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parallel.errors import ConfigError
from trainer.config_moe import LayoutConfig
from trainer.data.tokenizer import TextTokenizer
from trainer.draws import Sampling, choose, prompt_keys, uniform
from trainer.ranks import Ranks, idle

Stop = Callable[[list[int]], bool]
"""Whether a text ends here, given its tokens so far."""


@dataclass(frozen=True)
class Completion:
    """A text without its prompt. ``finish``: ``eos``, ``stop`` (asked for by the caller) or ``length``."""

    tokens: list[int]
    finish: str


@torch.no_grad()
def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos: int,
    context: int,
    device: torch.device,
    batch_size: int = 16,
    stops: Sequence[Stop | None] | None = None,
) -> list[Completion]:
    """Continue each prompt. With a process group up, every rank calls it with the same arguments.

    Args:
        model: whole or sharded; one with ``make_cache`` computes each token once.
        prompts: token ids, at least one each.
        eos: the token that ends a text; not part of it.
        context: the longest window that the model reads (``train.seq_len``). In a longer text each token is
            predicted from the ``context`` tokens before it, and these are computed anew for it.
        batch_size: rows of a rank at a time.
        stops: further ends, one a prompt.

    Raises:
        ConfigError: the model's logits are not finite (on every rank).
    """
    ranks = Ranks()
    keys = prompt_keys(prompts, sampling.seed)
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    rows = [
        _Row(list(prompts[i]), len(prompts[i]), keys[i], None if stops is None else stops[i])
        for i in longest_first
    ]
    mine = ranks.share(rows)
    most = -(-len(rows) // ranks.size)
    with dropless(model), evaluating(model):
        for start in range(0, most, batch_size):
            _complete_batch(model, mine[start : start + batch_size], sampling, eos, context, device, ranks)
    texts = ranks.join([Completion(row.tokens[row.start :], row.finish) for row in mine], len(rows))
    return [text for _, text in sorted(zip(longest_first, texts, strict=True), key=lambda pair: pair[0])]


@dataclass
class _Row:
    """A text on its way: prompt and what came after it."""

    tokens: list[int]
    start: int
    key: int
    stop: Stop | None
    finish: str = ""

    def add(self, token: int, eos: int, max_new_tokens: int) -> None:
        if token == eos:
            self.finish = "eos"
            return
        self.tokens.append(token)
        if self.stop is not None and self.stop(self.tokens[self.start :]):
            self.finish = "stop"
        elif len(self.tokens) - self.start >= max_new_tokens:
            self.finish = "length"


def _complete_batch(
    model: nn.Module,
    rows: list[_Row],
    sampling: Sampling,
    eos: int,
    context: int,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Bring these rows to their ends, in lock step with the other ranks' rows."""
    reader = _Reader(model, context, sampling.max_new_tokens, device)
    alive, bad = list(rows), False
    while True:
        num_alive, num_bad = ranks.sum(len(alive), bad)
        if num_bad:
            raise ConfigError(
                "checkpoint",
                "weights",
                "the model's logits are not finite: it has diverged",
                "use an earlier checkpoint",
            )
        if not num_alive:
            return
        if not alive:
            idle(model, device)
            continue
        logits_BV = reader.logits([row.tokens for row in alive])
        numbers = [uniform(row.key, len(row.tokens) - row.start) for row in alive]
        chosen_B = choose(logits_BV, numbers, sampling)
        finite = torch.isfinite(logits_BV).all().to(chosen_B.dtype)
        *chosen, is_finite = torch.cat([chosen_B, finite[None]]).tolist()  # the only host sync of a token
        bad = not is_finite
        for row, token in zip(alive, chosen, strict=True):
            row.add(token, eos, sampling.max_new_tokens)
        going_on = [index for index, row in enumerate(alive) if not row.finish]
        if len(going_on) < len(alive):
            alive = [alive[index] for index in going_on]
            reader.select(going_on)


@dataclass
class _Reader:
    """Logits after the last token of each row; reads again only what the model has not kept."""

    model: nn.Module
    context: int
    max_new_tokens: int
    device: torch.device
    cache: Any = None
    _make_cache: Any = field(init=False)

    def __post_init__(self) -> None:
        self._make_cache = cache_maker(self.model)

    def logits(self, rows: Sequence[list[int]]) -> Tensor:
        """``[B, V]``, fp32. One call of the model."""
        windows = [row[-self.context :] for row in rows]
        if self._make_cache is None:
            logits_BSV = self.model(self._padded(windows))
            last_B = torch.tensor([len(window) - 1 for window in windows], device=self.device)
            return logits_BSV[torch.arange(len(windows), device=self.device), last_B].float()
        longest = max(map(len, rows))
        if longest > self.context:
            self.cache = None  # what is kept was computed at positions that have moved
        known = [0] * len(rows)
        if self.cache is None:
            size = min(self.context, longest + self.max_new_tokens)
            cache = self._make_cache(len(rows), size, self.device)
            self.cache = cache if longest <= self.context else None
        else:
            cache, known = self.cache, self.cache.lengths
        new = [window[seen:] for window, seen in zip(windows, known, strict=True)]
        return self.model(self._padded(new), cache=cache.next([len(tokens) for tokens in new]))

    def select(self, rows: list[int]) -> None:
        """Go on with these rows."""
        if self.cache is not None and rows:
            self.cache.select(rows)

    def _padded(self, rows: Sequence[list[int]]) -> Tensor:
        """``[B, S]``; what stands on the right of a row is seen by none of its positions."""
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)


def cache_maker(model: nn.Module) -> Callable[[int, int, torch.device], Any] | None:
    """``make_cache`` of a model whose forward takes a ``cache``; None for one of the user's that does not.

    An engine may have wrapped it (DDP, DeepSpeed) in a module that passes keywords on.
    """
    parameters = inspect.signature(model.forward).parameters
    if "cache" in parameters:
        return getattr(model, "make_cache", None)
    inner = getattr(model, "module", None)
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return cache_maker(inner) if passes_on and isinstance(inner, nn.Module) else None


@contextmanager
def dropless(model: nn.Module) -> Iterator[None]:
    """Routers without a capacity.

    In training each packed row of ``seq_len`` has so many places at an expert. A text on its way has no such
    row: with a capacity, whether a token is dropped would depend on its length so far and on its padding.
    """
    found = [getattr(module, "layout", None) for module in model.modules()]
    layouts = [layout for layout in found if isinstance(layout, LayoutConfig)]
    before = [layout.capacity_factor for layout in layouts]
    for layout in layouts:
        layout.capacity_factor = None
    try:
        yield
    finally:
        for layout, factor in zip(layouts, before, strict=True):
            layout.capacity_factor = factor


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()``, and after it what was before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def sample(
    model: nn.Module,
    tokenizer: TextTokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    device: torch.device,
    context: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """The continuation of one prompt, without it. Collective, as :func:`complete`, whose arguments these are.

    Raises:
        ConfigError: the model's logits are not finite (on every rank).
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed=seed)
    tokens = tokenizer.encode(prompt) or [tokenizer.eos]
    (text,) = complete(model, [tokens], sampling, eos=tokenizer.eos, context=context, device=device)
    return tokenizer.decode(text.tokens)
