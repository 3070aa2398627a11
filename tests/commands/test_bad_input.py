"""What a user gets wrong is said once, with the field, the rule and the nearest thing that works."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import EP2, MUSTER, SMALL, Workplace
from tests.commands.watch import assert_nothing_left, assert_one_error

THREE = "launcher.nproc_per_node=3"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["optim.lrr=1e-3"], ["optim.lrr=1e-3: there is no such key", "did you mean optim.lr=1e-3"]),
        (["layout=mixtrl"], ["layout=mixtrl", "must be one of", "Fix: layout=mixtral."]),
        (["train.steps=many"], ["train.steps=many", "must be a whole number"]),
        (
            [THREE, "parallel.ep=3", "train.global_batch=9"],
            ["parallel.ep=3", "must divide layout.num_experts = 8", "Fix: parallel.ep=1."],
        ),
        (
            [THREE, "parallel.dp_replicate=2"],
            ["parallel.dp_replicate=2", "the world of 3 rank(s) is not divisible", "Fix: parallel.dp_rep"],
        ),
        (
            [THREE],
            [
                "train.global_batch=8",
                "must be a multiple of dp (3)",
                "Fix: train.global_batch=9, or train.pad_batch=true.",
            ],
        ),
        (
            [*EP2, "train.micro_batch=3"],
            [
                "train.global_batch=8",
                "a multiple of micro_batch · dp (3 · 2 = 6)",
                "train.global_batch=6, or ",
            ],
        ),
        (["data.path=nowhere"], ["data.path=", "nowhere", "there is no such file or folder"]),
        (
            ["run.root=corpus/csv.txt/runs"],
            ["run.root=", "corpus/csv.txt/runs/e2e cannot be written: Not a directory"],
        ),
        (["device=cuda"], ["device=cuda: takes ", "device=cpu"]),
    ],
    ids=lambda value: value[-1] if value and "=" in value[-1] and " " not in value[-1] else "",
)
def test_a_wrong_value_is_one_message(
    shared_workplace: Workplace, overrides: list[str], parts: list[str]
) -> None:
    if overrides == ["device=cuda"] and list(Path("/dev").glob("nvidia[0-9]*")):
        overrides = ["device=cuda", "launcher.nproc_per_node=64", "train.global_batch=64"]
    output = shared_workplace.train(*overrides, "run.id=wrong", expect=2)
    assert_one_error(output, *parts)
    assert len(output.splitlines()) == 1, output
    runs = shared_workplace.path / "runs"
    assert not [path for path in runs.rglob("*") if path.is_file()], "nothing was begun"
    assert_nothing_left(shared_workplace)


PLUGINS = """\
from trainer.callbacks import Callback


class Raises(Callback):
    def __init__(self) -> None:
        raise RuntimeError("no such sensor")


class Named(Callback):
    def on_step_end(self, trainer, metrics):
        return {"temperature": 3.0}
"""


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        pytest.param(
            *(["model.target=theirs:Model"], ["model.target=theirs:Model", "there is no module 'theirs'"]),
            marks=pytest.mark.long,
        ),
        pytest.param(
            ['callbacks=[{target: "mine:Named"}]'],
            ["callbacks[0].target=mine:Named", "the metric 'temperature'", "Fix: user/temperature."],
            marks=pytest.mark.long,
        ),
        (
            [*EP2, 'callbacks=[{target: "mine:Raises"}]'],
            ["callbacks[0].target=mine:Raises", "raised RuntimeError: no such sensor", "mine.py:6"],
        ),
    ],
    ids=["missing", "raises in a step", "raises on two ranks"],
)
def test_a_plugin_that_cannot_work_is_said_once_and_not_tried_again(
    workplace: Workplace, overrides: list[str], parts: list[str]
) -> None:
    (workplace.path / "mine.py").write_text(PLUGINS)
    output = workplace.train(*overrides, expect=2)
    assert_one_error(output, *parts)
    assert "failure" not in output
    assert_nothing_left(workplace)


def test_an_unknown_command_or_none(workplace: Workplace) -> None:
    assert "muster train experiment=quickstart" in workplace.run(MUSTER)
    assert workplace.run(MUSTER, "--version").startswith("muster 0.")
    assert_one_error(workplace.run(MUSTER, "trian", *SMALL, expect=2), "command=trian", "Fix: muster train.")
