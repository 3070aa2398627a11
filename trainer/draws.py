"""Choosing a token from logits: greedy, or a draw that depends on the prompt and on nothing beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.bits import mix64_int, name_key


@dataclass(frozen=True)
class Sampling:
    """How text is drawn.

    Attributes:
        max_new_tokens: after which a text ends.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that have this probability together (nucleus sampling,
            arXiv:1904.09751); 1: all.
        top_k: draw among this many likeliest tokens; 0: all.
        seed: of the draws.
    """

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    top_k: int = 0
    seed: int = 0


def prompt_keys(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    """A key of each prompt's draws: its tokens, the seed, and how often the same tokens came before.

    So a prompt gives the same text alone and beside others, and several times the same prompt several texts.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    keys = []
    for prompt in prompts:
        tokens = tuple(prompt)
        keys.append(name_key(f"{seen[tokens]}: {tokens}", seed=mix64_int(seed % 2**64)))
        seen[tokens] += 1
    return keys


def uniform(key: int, position: int) -> float:
    """In [0, 1), for the token at ``position`` of a text."""
    return (mix64_int(mix64_int(key) ^ position) >> 32) * 2.0**-32


def choose(logits_BV: Tensor, uniform_B: Sequence[float], sampling: Sampling) -> Tensor:
    """One token a row, int64 ``[B]``.

    The draw goes through the vocabulary in its own order, not by rank: where two tokens are equally likely
    but for rounding, a batch and a single row still draw alike.

    Args:
        logits_BV: fp32.
        uniform_B: a number in [0, 1) for each row (:func:`uniform`).
    """
    if sampling.temperature == 0.0:
        return logits_BV.argmax(-1)
    probability_BV = torch.softmax(logits_BV / sampling.temperature, -1)
    if sampling.top_k or sampling.top_p < 1.0:
        ordered, order = probability_BV.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        left_out = before >= sampling.top_p
        if sampling.top_k:
            left_out[:, sampling.top_k :] = True
        left_out[:, 0] = False
        probability_BV = torch.zeros_like(ordered).scatter_(-1, order, ordered.masked_fill(left_out, 0.0))
    reached = probability_BV.double().cumsum(-1)
    point = torch.tensor(uniform_B, dtype=torch.float64, device=reached.device) * reached[:, -1]
    return (reached <= point[:, None]).sum(-1)
