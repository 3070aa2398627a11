"""One GPU against the CPU. What needs several GPUs has not been run anywhere yet (README)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel.engines.base import StateSlice
from parallel.mesh import build_meshes
from tests.command import Workplace
from tests.distributed import cases, oracle
from tests.distributed.test_parity import OTHER_LAYOUTS
from trainer.bits import normal_
from trainer.build import build_dispatcher, build_engine, build_model
from trainer.checkpoint.digest import combine, weights_digest
from trainer.checkpoint.durable import DurableCheckpointer
from trainer.checkpoint.resume import open_checkpoint
from trainer.config import RunConfig, parallel_dims
from trainer.models.init import initialise
from trainer.moe.experts import grouped_linear
from trainer.step import Stepper

LAYOUTS = {**{name: [] for name in ("dense", "switch", "mixtral", "deepseek")}, **OTHER_LAYOUTS}


class OneProcess:
    """An engine and its stepper on one device."""

    def __init__(self, config: RunConfig, device: str) -> None:
        self.config = config
        meshes = build_meshes(parallel_dims(config), device)
        self.engine = build_engine(config, meshes, torch.device(device))
        self.engine.prepare(build_model(config, build_dispatcher(meshes)))
        initialise(self.engine.model, self.engine.named_state(), config.train.seed)
        self.stepper = Stepper(self.engine, config, torch.device(device), wants_stop=lambda: False)

    def train(self, start: int, stop: int) -> list[float]:
        losses = []
        for step in range(start, stop):
            result = self.stepper.train_step(step, [oracle.batch_of_step(self.config, step)])
            losses.append(result.totals.mean(result.totals.cross_entropy))
        return losses

    def digest(self) -> str:
        return combine([weights_digest(p for p in self.engine.named_state() if p.name.startswith("model."))])

    def save(self, folder: Path, step: int) -> None:
        saver = DurableCheckpointer(folder, 0, 1, f"s{step}", 2, 0, 60.0)
        saver.save(step, self.engine.named_state(), {}, {}, {})
        saver.wait()


@pytest.fixture(autouse=True)
def exact_matmuls(world_of_one: None) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp32_equals_the_cpu(layout: str) -> None:
    config = cases.small_config(f"layout={layout}", *LAYOUTS[layout], "train.dtype=fp32")
    cpu, gpu = OneProcess(config, "cpu"), OneProcess(config, "cuda")
    assert cpu.digest() == gpu.digest(), "the same initial bits"
    assert gpu.train(0, 5) == pytest.approx(cpu.train(0, 5), rel=1e-5)
    weights = {p.name: p.tensor for p in cpu.engine.named_state()}
    for piece in gpu.engine.named_state():
        if piece.name.startswith("model."):
            wanted = weights[piece.name]
            deviation = torch.linalg.vector_norm(piece.tensor.cpu().double() - wanted.double())
            assert deviation <= 1e-4 * torch.linalg.vector_norm(wanted.double()), piece.name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_learns_and_is_repeatable(layout: str) -> None:
    config = cases.small_config(f"layout={layout}", *LAYOUTS[layout], "train.dtype=bf16", "optim.lr=3e-3")
    one, other = OneProcess(config, "cuda"), OneProcess(config, "cuda")
    losses = one.train(0, 8)
    assert losses == other.train(0, 8)
    assert one.digest() == other.digest()
    assert all(torch.isfinite(torch.tensor(losses)))


def test_initial_weights_have_the_same_bits_as_on_the_cpu() -> None:
    shape = (257, 129)
    cpu, gpu = torch.empty(shape), torch.empty(shape, device="cuda")
    normal_(cpu, 7, shape, (0, 0), std=0.02)
    normal_(gpu, 7, shape, (0, 0), std=0.02)
    assert torch.equal(cpu, gpu.cpu())
    digests = [weights_digest([StateSlice("model.w", shape, (0, 0), t, True)]) for t in (cpu, gpu)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_linear_equals_a_loop(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = [40, 0, 24, 64]
    x = torch.randn(128, 64, dtype=dtype, device="cuda", requires_grad=True)
    w = torch.randn(4, 64, 96, dtype=dtype, device="cuda", requires_grad=True)
    y = grouped_linear(x, w, torch.tensor(sizes, device="cuda").cumsum(0).int())
    expected = torch.cat([part @ w[i] for i, part in enumerate(x.split(sizes))])
    loose = {"rtol": 2e-2, "atol": 2e-1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y, expected, **loose)
    probe = torch.randn_like(y)
    found = torch.autograd.grad((y * probe).sum(), [x, w])
    wanted = torch.autograd.grad((expected * probe).sum(), [x, w])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **loose)


@pytest.mark.parametrize(("first", "second"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_crosses_devices(tmp_path: Path, first: str, second: str) -> None:
    config = cases.small_config("layout=mixtral", "train.dtype=fp32")
    saver = OneProcess(config, first)
    saver.train(0, 3)
    saver.save(tmp_path, 3)
    loader = OneProcess(config, second)
    open_checkpoint(tmp_path).load_into(loader.engine.named_state())
    assert loader.digest() == saver.digest()
    assert loader.train(3, 6) == pytest.approx(saver.train(3, 6), rel=1e-5)


def test_kill_and_resume_leaves_the_same_bits(workplace: Workplace) -> None:
    common = ["device=cuda", "train.dtype=bf16", "layout=mixtral", "launcher.nproc_per_node=1"]
    common += ["parallel.ep=1", "train.steps=20", "checkpoint.every=5"]
    workplace.train(*common, "run.id=calm")
    marks = workplace.path / "marks"
    killer = f'{{target: "tests.chaos.plugins:KillAt", kwargs: {{folder: "{marks}", at: [[8, 0], [13, 0]]}}}}'
    workplace.train(*common, f"callbacks=[{killer}]")
    assert len(workplace.events("failure")) == 2
    assert workplace.digest() == workplace.digest(workplace.path / "runs" / "e2e" / "calm")
