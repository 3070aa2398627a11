"""Runs that began in Muster go out, as docs/huggingface.md says, and come back the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from interop_helpers import tokenizer

from launch.convert import export, import_
from parallel.dispatch.local import LocalDispatcher
from parallel.engines.base import whole_state
from tests.configs import composed
from trainer.build import build_model
from trainer.checkpoint.durable import DurableCheckpointer
from trainer.checkpoint.resume import open_checkpoint
from trainer.config import Machine, RunConfig, resolve
from trainer.models.init import initialise
from trainer.rules import validate
from trainer.rundir import RunDirectory

SMALL = (
    "device=cpu model.dim=32 model.num_layers=3 model.num_heads=4 model.num_kv_heads=2 model.ffn_dim=48 "
    "model.init_std=0.2 data.tokenizer.vocab_size=260 train.seq_len=64"
).split()
MLA = "model.mla={q_lora_rank: 0, kv_lora_rank: 16, qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 8}"
YARN = "model.rope_scaling={kind: yarn, factor: 4, original_context: 32, mscale: 1, mscale_all_dim: 1}"
LLAMA3 = "model.rope_scaling={kind: llama3, factor: 8, original_context: 32}"
RUNS: dict[str, list[str]] = {
    "llama": ["layout=dense", LLAMA3, "model.tied_embeddings=true"],
    "mixtral": [
        "layout=mixtral",
        "train.dtype=bf16",
        "model.rope_scaling={kind: yarn, factor: 4, original_context: 32}",
    ],
    "qwen3_moe": [
        "layout=qwen3_moe",
        "model.qk_norm=head",
        "layout.first_dense_layers=1",
        "layout.moe_every=2",
        "model.num_layers=5",
    ],
    "olmoe": ["layout=olmoe", "model.qk_norm=full"],
    "deepseek_v3": ["layout=deepseek", "model.attention=mla", MLA, "model.mla.norm_eps=1e-6", YARN],
}


def make_run(path: Path, overrides: list[str]) -> RunConfig:
    """A run directory with a checkpoint of fresh weights and what surrounds it."""
    config = resolve(composed(*SMALL, *overrides), Machine(num_cpus=1))
    validate(config)
    model = build_model(config, LocalDispatcher()).to_empty(device="cpu")
    initialise(model, whole_state(model), seed=1)
    for name, buffer in model.named_buffers():
        if name.endswith("bias_E"):
            buffer.normal_(std=0.1)
    run = RunDirectory(path)
    run.freeze(config)
    tokenizer().save(path / "tokenizer.json")
    saver = DurableCheckpointer(path / "checkpoints", 0, 1, "test", 1, 0, 60.0)
    saver.save(7, whole_state(model), {"step": 7}, {}, {})
    saver.wait()
    return config


@pytest.mark.parametrize("family", RUNS)
def test_out_and_in_again(family: str, tmp_path: Path) -> None:
    config = make_run(tmp_path / "run", RUNS[family])
    export([str(tmp_path / "run"), str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert found["family"] == family and found["verification"]["relative"] <= 1e-5
    types = {row["hf_dtype"] for row in found["tensors"]}
    assert types == ({"BF16"} if config.train.dtype.value == "bf16" else {"F32"})
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.eos_token_id, loaded("def f(x):").input_ids) == (
        tokenizer().eos,
        tokenizer().encode("def f(x):"),
    )
    import_(
        [
            str(tmp_path / "out"),
            str(tmp_path / "back"),
            "device=cpu",
            "verify=false",
            f"layout={config.layout.name}",
        ]
    )
    back = RunDirectory(tmp_path / "back").config()
    names = (
        "rope_theta",
        "rope_scaling",
        "norm_eps",
        "tied_embeddings",
        "qk_norm",
        "attention",
        "vocab_size",
    )
    assert all(getattr(back.model, name) == getattr(config.model, name) for name in names)
    assert back.layout == config.layout
    if types == {"F32"}:
        digests = [open_checkpoint(tmp_path / name).weights_digest for name in ("run", "back")]
        assert digests[0] == digests[1]
