"""Logits with a cache are those without one, and only the experts that were chosen are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from launch.convert import import_
from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from tests.configs import composed
from tests.unit.interop.interop_helpers import make
from trainer.build import build_model, load_for_inference
from trainer.checkpoint.resume import open_checkpoint
from trainer.compose import load_frozen
from trainer.config import Machine, resolve
from trainer.draws import Sampling
from trainer.generation import complete, dropless
from trainer.models.init import fill_buffers, initialise

CPU = torch.device("cpu")
SMALL = [
    "model.dim=32",
    "model.num_layers=3",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.ffn_dim=48",
    "model.init_std=0.2",
    "data.tokenizer.vocab_size=264",
]
MLA = [
    "model.attention=mla",
    "model.num_kv_heads=4",
    "model.mla={q_lora_rank: 24, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 12}",
]


def small_model(*overrides: str) -> nn.Module:
    torch.set_num_threads(1)
    config = resolve(composed(*SMALL, *overrides), Machine(num_cpus=1))
    model = build_model(config, LocalDispatcher()).to_empty(device=CPU)
    initialise(model, whole_state(model), seed=0)
    fill_buffers(model)
    return model.eval()


@pytest.mark.parametrize(
    "overrides",
    [
        ["layout=dense"],
        ["layout=dense", "model.qk_norm=head", "model.tied_embeddings=true"],
        ["layout=mixtral", "model.qk_norm=full"],
        ["layout=switch", "layout.capacity_factor=0.5"],
        ["layout=deepseek", *MLA],
        *([f"layout={name}"] for name in ("hierarchical", "sinkhorn", "expert_choice", "hash", "ernie")),
        ["layout=moe_plus_plus"],
    ],
    ids=lambda overrides: " ".join(overrides)[:40],
)
@torch.no_grad()
def test_logits_with_a_cache_are_those_without(overrides: list[str]) -> None:
    model = small_model(*overrides)
    tokens = torch.randint(0, 264, (3, 21), generator=torch.Generator().manual_seed(1))
    lengths = [9, 4, 1]  # of the prompts: rows stand at different places all along
    with dropless(model):
        expected = model(tokens)
        cache = model.make_cache(3, 21, CPU)
        padded = torch.zeros(3, 9, dtype=torch.int64)
        for row, length in enumerate(lengths):
            padded[row, :length] = tokens[row, :length]
        found = [model(padded, cache=cache.next(lengths))]
        for step in range(12):
            at = torch.tensor(lengths) + step
            found.append(model(tokens.gather(1, at[:, None]), cache=cache.next([1, 1, 1])))
    assert cache.lengths == [21, 16, 13]
    at = torch.tensor(lengths)[:, None] - 1 + torch.arange(13)
    wanted = expected.gather(1, at[..., None].expand(-1, -1, 264))
    assert wanted.std() > 0.5, "else any logits would do"
    torch.testing.assert_close(torch.stack(found, 1), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_several_tokens_at_once_and_rows_that_leave() -> None:
    model = small_model("layout=mixtral", *MLA)
    tokens = torch.randint(0, 264, (3, 12), generator=torch.Generator().manual_seed(2))
    expected = model(tokens)
    cache = model.make_cache(3, 12, CPU)
    model(tokens[:, :5], cache=cache.next([5, 5, 5]))
    cache.select([2, 0])
    found = model(tokens[[2, 0], 5:11], cache=cache.next([6, 6]))
    torch.testing.assert_close(found, expected[[2, 0], 10], rtol=0, atol=1e-5)


def test_mla_keeps_a_latent_a_token_and_not_every_head() -> None:
    cache: Any = small_model("layout=dense", *MLA).make_cache(2, 10, CPU)
    assert cache.num_bytes == 3 * 2 * 10 * (16 + 4) * 4
    cache = small_model("layout=dense").make_cache(2, 10, CPU)
    assert cache.num_bytes == 3 * 2 * 10 * 2 * (2 * 8) * 4, "two of four heads have keys and values"


@torch.no_grad()
def test_a_new_token_costs_its_own_experts_and_no_others() -> None:
    model = small_model("layout=deepseek", "layout.top_k=3", "layout.first_dense_layers=1")
    rows: list[tuple[int, int]] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append((int(inputs[1].sum()), int((inputs[1] > 0).sum())))

    hooks = [
        layer.feed_forward.experts.register_forward_pre_hook(count)  # type: ignore[union-attr,operator]
        for layer in model.layers[1:]  # type: ignore[union-attr,index]
    ]
    complete(model, [[5, 6, 7, 8], [9] * 4], Sampling(4, 0.0), eos=-1, context=16, device=CPU)
    for hook in hooks:
        hook.remove()
    assert [num_rows for num_rows, _ in rows] == [2 * 4 * 3] * 2 + [2 * 3] * 6
    assert all(num_experts <= 2 * 3 < 32 for _, num_experts in rows[2:])


@pytest.mark.parametrize("variant", ["llama", "mixtral", "deepseek_v3"])
def test_greedy_text_is_that_of_transformers(variant: str, tmp_path: Path) -> None:
    """Grouped queries, experts, and the cache of latents of MLA under YaRN."""
    torch.set_num_threads(1)
    source, run = make(variant, tmp_path / "model"), tmp_path / "run"
    import_([str(source), str(run), "device=cpu", "verify=false"])
    config = load_frozen(run / "config.yaml")
    ours = load_for_inference(open_checkpoint(run), config, CPU).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [27, 18]]
    found = complete(ours, prompts, Sampling(16, 0.0), eos=-1, context=64, device=CPU)
    settings = transformers.GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=0)
    for prompt, text in zip(prompts, found, strict=True):
        whole = theirs.generate(torch.tensor([prompt]), generation_config=settings)[0].tolist()
        assert text.tokens == whole[len(prompt) :]
        assert len(set(text.tokens)) > 2
