"""`make bench-step`: everyone it measures trains the same model, and who does not is called WRONG."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from bench import step as bench
from bench.step_contestant import PLAIN, DeepSpeedMoe, Muster, Training, Transformers, product_sizes
from parallel.dispatch.local import LocalDispatcher
from parallel.mesh import Meshes, build_meshes
from trainer.build import build_model
from trainer.compose import compose
from trainer.config import Machine, parallel_dims, resolve
from trainer.models.cost import model_cost

SMALL = ["model.dim=32", "model.ffn_dim=48", "model.num_layers=2", "model.vocab_size=64", "train.seq_len=16"]


@pytest.fixture(scope="module")
def meshes() -> Iterator[Meshes]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield build_meshes(parallel_dims(bench.config_of("fp32", [])), "cpu")
    torch.set_num_threads(threads)
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_lose_as_much_as_transformers_does(dtype: str, meshes: Meshes) -> None:
    config = bench.config_of(dtype, [*PLAIN, *SMALL])
    trainings: dict[str, Training] = {"Muster": Muster(config, meshes)}
    trainings |= {name: Transformers(config, way) for name, way in bench.ways(dtype, compiled=False).items()}
    if dtype == "fp32":
        trainings["DeepSpeed"] = DeepSpeedMoe(config)
    full = bench.config_of("fp32", [*PLAIN, *SMALL])
    right = bench.first_losses(Transformers(full, bench.EAGER), full)
    assert right[0] != right[-1]
    judged = {
        name: bench.judged(bench.first_losses(training, config), right, bench.LIMITS[dtype])
        for name, training in trainings.items()
    }
    assert judged == dict.fromkeys(trainings, "")


def test_the_model_for_a_gpu_is_that_of_transformers(meshes: Meshes) -> None:
    small = [
        *bench.COMMON,
        *bench.CONFIGS["cuda"],
        *PLAIN,
        *SMALL,
        "model.num_heads=4",
        "model.num_kv_heads=4",
    ]
    small += ["model.num_layers=4", "layout.num_experts=8", "layout.top_k=2", "train.global_batch=2"]
    config = resolve(compose([*small, "device=cpu", "train.dtype=fp32"]), Machine.here())
    right = bench.first_losses(Transformers(config, bench.EAGER), config)
    found = bench.first_losses(Muster(config, meshes), config)
    assert bench.judged(found, right, bench.LIMITS["fp32"]) == "" and right[0] != right[-1]
    assert bench.config_of("bf16", PLAIN, "cuda").train.seq_len == 4096


def test_the_page_has_rates() -> None:
    rows = [bench.Row(name, [1.0], [100.0, 100.0]) for name in (bench.MUSTER, bench.FLOORS["cuda"])]
    block = bench.Block("bf16", "cuda", rows, tokens=2048, flops=2e13, peak=1e15, parts={"experts": 1.0})
    assert "| Muster | 100 | 20,480 | 20% | 1.00 [1.00, 1.00] |" in bench.table(block)
    page = bench.page("head", [block], 2, [])
    assert page.startswith("# One training step of four layers of OLMoE") and "one GPU" in page


def test_who_trains_otherwise_is_called_wrong(meshes: Meshes) -> None:
    config = bench.config_of("fp32", [*PLAIN, *SMALL])
    other = bench.config_of("fp32", [*PLAIN, *SMALL, "optim.lr=1e-4"])
    right = bench.first_losses(Muster(config, meshes), config)
    found = bench.judged(bench.first_losses(Muster(other, meshes), config), right, bench.LIMITS["fp32"])
    assert found.startswith("WRONG: its losses differ by ")


def test_the_floor_has_the_flops_of_the_model() -> None:
    config = bench.config_of("fp32", SMALL)
    tokens = config.train.global_batch * config.train.seq_len
    vectors = (2 * config.model.num_layers + 1) * config.model.dim
    cost = model_cost(build_model(config, LocalDispatcher()), config)
    floor = sum(6 * rows * inner * outer for rows, inner, outer in product_sizes(config))
    assert floor == tokens * (cost.flops_per_token - 6 * vectors)
