"""A model of transformers is imported, trained on two processes, exported, and loaded by transformers again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from launch.convert import export, import_
from tests.command import EP2, MUSTER, Workplace
from trainer.build import load_for_inference
from trainer.checkpoint.resume import open_checkpoint
from trainer.compose import load_frozen
from trainer.data.tokenizer import TextTokenizer
from trainer.generation import sample

TRAIN = [
    "device=cpu",
    "data=text",
    "train.seq_len=32",
    "train.global_batch=4",
    "train.num_threads=1",
    "train.steps=2",
    "logger.wandb.mode=disabled",
    "eval.max_rows=4",
]


def save_mixtral(folder: Path, corpus: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    TextTokenizer.train(texts, 300).save(folder / "tokenizer.json")


def test_import_train_export(workplace: Workplace) -> None:
    place, corpus = workplace, workplace.path / "corpus"
    save_mixtral(place.path / "model", corpus)
    run = place.path / "runs" / "imported" / "a"
    import_([str(place.path / "model"), str(run), *TRAIN, *EP2, f"data.path={corpus}"])
    # In place, and as a run of its own from the group that import wrote: the same start.
    place.resume(run_dir=run)
    group = [f"--config-dir={run / 'conf'}", "model=imported", "run.name=e2e", "run.id=a"]
    place.run(MUSTER, "train", *group, *TRAIN, f"data.path={corpus}")
    losses = place.losses(run)
    assert place.losses() == pytest.approx(losses, rel=1e-5) and losses.keys() == {1, 2}
    assert losses[1] > 6, "that of the imported weights, not of fresh ones"

    folder = place.path / "exported"
    export([str(run), str(folder)])
    found = json.loads((folder / "conversion.json").read_text())
    assert found["verification"]["relative"] <= 1e-5 and found["family"] == "mixtral"
    assert found["weights_digest"] == place.digest(run)
    # A setting that is no part of the run's config: it comes from the model that was imported.
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 128
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|endoftext|>"
    ids = tokenizer("def main():", return_tensors="pt").input_ids
    theirs = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    loaded = load_for_inference(open_checkpoint(run), load_frozen(run / "config.yaml"), torch.device("cpu"))
    ours = sample(
        loaded.model,
        loaded.tokenizer,
        "def main():",
        max_new_tokens=8,
        device=loaded.device,
        context=64,
        temperature=0.0,
    )
    assert tokenizer.decode(theirs, skip_special_tokens=True) == ours != ""
