"""A model larger than memory converts: what a conversion holds does not grow with the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from interop_helpers import COMMON, tokenizer
from torch import Tensor

from trainer.interop.family import BLOCK, DENSE, GQA, TOP
from trainer.interop.tensors import Planned, write_files

REPO = Path(__file__).resolve().parents[3]
DIM, FFN = 512, 1536

CODE = """
import sys
from pathlib import Path

import torch

from launch.convert import export, import_
from trainer.interop import hf_export, hf_import

torch.set_num_threads(1)
hf_import._PART_BYTES = 16 << 20


def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(kind))


def convert(model, run, back):
    marks = []
    for command in (
        lambda: import_([model, run, "device=cpu", "verify=false"]),
        lambda: export([run, back, "verify=false", "shard_size=100MB"]),
    ):
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark so far is forgotten
        command()
        marks.append(resident("VmHWM") - before)
    return marks


convert("small", "small-run", "small-back")  # what the modules take once is no part of a model
print(*convert("large", "large-run", "large-back"))
"""


def write_llama(folder: Path, layers: int) -> int:
    """A Llama of random bf16 weights; its bytes in fp32."""
    heads = {"vocab_size": 264, "hidden_size": DIM, "num_hidden_layers": layers, "intermediate_size": FFN}
    config = {**COMMON, **heads, "num_key_value_heads": 4, "model_type": "llama"}
    shapes = {"w1": (FFN, DIM), "w3": (FFN, DIM), "w2": (DIM, FFN)}
    planned = [Planned(name, torch.bfloat16, (264, DIM)) for name in TOP.values() if "norm" not in name]
    planned.append(Planned(TOP["norm.weight"], torch.bfloat16, (DIM,)))
    for layer in range(layers):
        for ours, theirs in {**BLOCK, **GQA, **DENSE}.items():
            shape = (DIM,) if "norm" in ours else shapes.get(ours.split(".")[-2], (DIM, DIM))
            planned.append(Planned(f"model.layers.{layer}.{theirs}", torch.bfloat16, shape))

    def produce(tensor: Planned) -> Tensor:
        return torch.empty(tensor.shape).uniform_(-0.1, 0.1).to(tensor.dtype)

    folder.mkdir()
    write_files(folder, planned, 40 << 20, produce)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer().save(folder / "tokenizer.json")
    return 2 * sum(tensor.bytes for tensor in planned)


def test_memory_does_not_follow_the_model(tmp_path: Path) -> None:
    write_llama(tmp_path / "small", 1)
    size = write_llama(tmp_path / "large", 24)
    assert size > 300e6
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stderr
    into, back = map(int, done.stdout.splitlines()[-1].split())
    print(f"{size:,} bytes in fp32; import grew by {into:,}, export by {back:,}")
    assert abs(into) < size / 4  # the kernel counts pages roughly: it may be less than before
    assert abs(back) < size / 4
