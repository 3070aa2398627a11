"""What the routers of trained models choose, for the routing ``recorded`` of bench/layer.py.

    python -m bench.routing

For each E and K of its shapes a small model is trained for some hundred steps with that many experts, and the
choices of its last steps' tokens go to bench/data/routing.npz: uint8 ``[layers, tokens, K]`` under ``E8_K2``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from bench.layer_work import RECORDED
from bench.quickstart import QUIET, REPO

TOKENS = 8192
SEQ_LEN, ROWS = 256, 4
LAYERS = 4
RUNS = {
    "E8_K2": ["layout=mixtral"],
    "E64_K8": ["layout=olmoe", "layout.num_experts=64", "layout.top_k=8", "layout.granularity=8"],
    "E8_K1": ["layout=switch"],
}
SMALL = [
    *("launcher.nproc_per_node=1", "parallel.ep=1", "model.dim=64", f"model.num_layers={LAYERS}"),
    *("model.ffn_dim=128", f"train.seq_len={SEQ_LEN}", f"train.global_batch={ROWS}", "health.trace_every=1"),
]


def record(overrides: list[str], steps: int) -> np.ndarray:
    """Train; ``[layers, TOKENS, K]`` of the last steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).parent / "muster"), "train", *QUIET, *overrides, *SMALL]
        command += [f"train.steps={steps}", f"run.root={folder}"]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
        last = sorted(Path(folder).rglob("train-*.safetensors"))[-TOKENS // (SEQ_LEN * ROWS) :]
        # [layers, rows, positions, K] of each step
        chosen = np.concatenate([load_file(file)["experts"] for file in last], axis=1)
        return chosen.reshape(LAYERS, -1, chosen.shape[-1]).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps
    recorded = {}
    for name, overrides in RUNS.items():
        began = time.perf_counter()
        recorded[name] = record(overrides, steps)
        loads = [np.bincount(layer.flat).max() / np.bincount(layer.flat).mean() for layer in recorded[name]]
        about = ", ".join(f"{load:.2f}" for load in loads)
        print(f"{name}: {time.perf_counter() - began:.0f} s, max/mean of each layer {about}", flush=True)
    RECORDED.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORDED, allow_pickle=False, **recorded)
    print(f"{RECORDED.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
