"""Text from a model: sampling, in one process or with a model sharded over ranks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.errors import ConfigError
from trainer.data.tokenizer import TextTokenizer


@torch.no_grad()
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
    """Continue ``prompt`` until ``max_new_tokens`` or the end of the document.

    With a process group up, every rank must call it with the same arguments; rank 0's draws are everyone's.

    Args:
        context: the longest window the model reads (``train.seq_len``); older tokens slide out.
        temperature: 0 takes the likeliest token.
        top_p: nucleus sampling (arXiv:1904.09751).
        seed: of the draws.

    Returns:
        The continuation, without the prompt.

    Raises:
        ConfigError: the model's logits are not finite.
    """
    tokens = tokenizer.encode(prompt) or [tokenizer.eos]
    start = len(tokens)
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-context:]], device=device)
        logits_V = model(window)[0, -1].float().cpu()
        if not bool(torch.isfinite(logits_V).all()):
            raise ConfigError(
                "checkpoint",
                "weights",
                "the model's logits are not finite: it has diverged",
                "use an earlier checkpoint",
            )
        chosen = _draw(logits_V, temperature, top_p, generator)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(chosen, src=0)
        if int(chosen) == tokenizer.eos:
            break
        tokens.append(int(chosen))
    model.train(training)
    return tokenizer.decode(tokens[start:])


def _draw(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token, int64 ``[1]``."""
    if temperature == 0.0:
        return logits_V.argmax(keepdim=True)
    probability, order = torch.softmax(logits_V / temperature, -1).sort(descending=True)
    before = probability.cumsum(-1) - probability
    probability[before >= top_p] = 0.0
    return order[torch.multinomial(probability, 1, generator=generator)]


def generate_text(
    path: Path, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> str:
    """Load a checkpoint into one process and continue ``prompt``.

    Args:
        path: a run directory (its newest valid checkpoint is taken) or a checkpoint.

    Raises:
        ConfigError: there is no valid checkpoint at ``path``, or its tokenizer cannot be had.
    """
    from trainer.build import load_for_inference

    loaded = load_for_inference(path)
    return sample(
        loaded.model,
        loaded.tokenizer,
        prompt,
        max_new_tokens,
        device=loaded.device,
        context=loaded.config.train.seq_len,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
