"""A model, a layer, a dataset and a callback from the user's own folder, on two ranks as on one."""

from __future__ import annotations

import pytest

from tests.command import MUSTER, Workplace
from tests.commands.watch import assert_nothing_left

MODULE = '''
import torch
import torch.nn.functional as F
from torch import nn

from trainer.callbacks import Callback
from trainer.models.transformer import Losses


class Mixer(nn.Module):
    """A causal mean over the row, then a layer of torch's own kind."""

    def __init__(self, dim):
        super().__init__()
        self.ln = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        mean = self.ln(x).cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x + self.down(F.gelu(self.up(mean)))


class Model(nn.Module):
    """No init_std, no shard_units, a scalar for a result: as little as possible."""

    def __init__(self, config, dispatcher, depth):
        super().__init__()
        self.embedding = nn.Embedding(config.model.vocab_size, config.model.dim)
        self.blocks = nn.ModuleList(Mixer(config.model.dim) for _ in range(depth))
        self.head = nn.Linear(config.model.dim, config.model.vocab_size)

    def logits(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x).float()

    def forward(self, tokens, targets, document_ids):
        logits = self.logits(tokens)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


class FullModel(Model):
    """All that a model may say about itself."""

    def __init__(self, config, dispatcher, depth):
        super().__init__(config, dispatcher, depth)
        self.register_buffer("scale", torch.empty(()), persistent=False)

    def init_buffers(self):
        self.scale.fill_(0.5)

    def init_std(self, name):
        return 0.05 if name.startswith("embedding") else 0.01

    def shard_units(self):
        return list(self.blocks)

    def forward(self, tokens, targets=None, document_ids=None):
        if targets is None:
            return self.logits(tokens) * self.scale
        loss = super().forward(tokens, targets, document_ids)
        return Losses(loss, moe=())


class Gated(nn.Module):
    """A dense feed-forward layer that returns a tensor and nothing else."""

    def __init__(self, config, layer_index, dispatcher, width):
        super().__init__()
        self.gate = nn.Linear(config.model.dim, width)
        self.down = nn.Linear(width, config.model.dim)

    def forward(self, x):
        return self.down(torch.sigmoid(self.gate(x)) * self.gate(x))


def documents(data):
    for number in range(int(data.kwargs["count"])):
        yield {"name": f"document {number}", "text": f"{number} squared is {number * number}. " * 20}


class Watch(Callback):
    """Counts its steps across restarts, and reports the largest weight it has seen."""

    def __init__(self, unit):
        self.unit, self.steps = unit, 0

    def on_start(self, trainer):
        assert self.steps == trainer.state.step

    def on_step_end(self, trainer, metrics):
        self.steps += 1
        tensors = [piece.tensor for piece in trainer.engine.named_state() if piece.tensor.numel()]
        largest = max(float(tensor.abs().max()) for tensor in tensors)
        return {"user/steps": self.steps, f"user/largest_{self.unit}": largest}

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]
'''
TWO = "launcher.nproc_per_node=2"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A folder with the user's module in it."""
    workplace = Workplace(tmp_path_factory.mktemp("plugins"))
    (workplace.path / "mine.py").write_text(MODULE)
    return workplace


def test_model_dataset_and_callback(place: Workplace) -> None:
    everything = [
        "layout=dense",
        "model.target=mine:Model",
        "+model.kwargs.depth=2",
        "data.target=mine:documents",
        "+data.kwargs.count=200",
        'callbacks=[{target: "mine:Watch", kwargs: {unit: lengths}}]',
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        "optim.lr=1e-2",
    ]
    place.train(*everything, TWO, "train.steps=6", "logger.every=2")
    place.resume("train.steps=10")
    records = {record["step"]: record for record in place.records("metrics.jsonl")}
    assert sorted(records) == [2, 4, 6, 8, 10]
    assert [records[step]["user/steps"] for step in sorted(records)] == [2, 4, 6, 8, 10]
    assert records[10]["user/largest_lengths"] > 0
    assert records[10]["loss/train"] < records[2]["loss/train"] - 0.3

    place.train(*everything, "train.steps=10", "logger.every=2", "run.id=one")
    one = place.losses(place.run_dir.parent / "one")
    assert place.losses() == pytest.approx(one, rel=1e-5), "two ranks compute what one does"
    assert_nothing_left(place)


@pytest.mark.long
def test_a_model_that_says_all_about_itself_generates(place: Workplace) -> None:
    place.train(
        "layout=dense",
        "model.target=mine:FullModel",
        "+model.kwargs.depth=2",
        TWO,
        "train.steps=3",
        "eval.sample_tokens=3",
        "run.id=full",
    )
    run_dir = place.run_dir.parent / "full"
    assert place.events("finish", run_dir)[-1]["sample"]["text"]
    text = place.run(MUSTER, "generate", str(run_dir), "prompt=def ", "max_new_tokens=3")
    assert text.startswith("def ") and len(text) > 5


@pytest.mark.long
def test_a_feed_forward_layer_that_returns_a_tensor(place: Workplace) -> None:
    layer = ["layout.target=mine:Gated", "+layout.kwargs.width=24", "train.steps=4"]
    place.train(*layer, TWO, "train.activation_checkpointing=true", "run.id=layer2")
    place.train(*layer, "run.id=layer1")
    runs = place.run_dir.parent
    assert place.losses(runs / "layer2") == pytest.approx(place.losses(runs / "layer1"), rel=1e-5)
    record = place.records("metrics.jsonl", runs / "layer1")[-1]
    assert not [name for name in record if name.startswith("moe/")], "there is no expert in it"
