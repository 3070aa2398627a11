"""Other data and other precision, killed on the way: the same weights as without the kill."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command import Workplace
from tests.commands.plugins import entry
from tests.commands.watch import EP2

RUN = ["train.steps=12", "checkpoint.every=4"]


def texts() -> list[str]:
    """Real text, two documents a file."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "csv", "glob", "shlex", "textwrap", "inspect", "difflib")
    whole = [(stdlib / f"{name}.py").read_text() for name in names]
    return [part for text in whole for part in (text[: len(text) // 2], text[len(text) // 2 :])]


def killer(workplace: Workplace, at: list[list[int]]) -> str:
    """The override that kills ranks at (step, rank)."""
    marks = str(workplace.path / "marks")
    return f"callbacks=[{entry('tests.chaos.plugins:KillAt', folder=marks, at=at)}]"


def test_the_same_documents_as_jsonl_and_as_parquet(workplace: Workplace) -> None:
    lines, table = workplace.path / "texts.jsonl", workplace.path / "texts.parquet"
    lines.write_text("".join(json.dumps({"content": text}) + "\n" for text in texts()))
    pq.write_table(pa.table({"content": texts()}), table)
    common = [*EP2, *RUN, "data.text_field=content"]
    workplace.train(*common, "data=jsonl", f"data.path={lines}", "run.id=calm")
    kill = killer(workplace, [[6, 0]])
    workplace.train(*common, "data=parquet", f"data.path={table}", kill)
    calm = workplace.run_dir.parent / "calm"
    assert len(workplace.events("failure")) == 1
    assert workplace.digest() == workplace.digest(calm)
    assert workplace.losses() == workplace.losses(calm)


def test_a_streamed_dataset_goes_on_where_it_was(workplace: Workplace) -> None:
    folder = workplace.path / "hub"
    folder.mkdir()
    for number in range(3):
        pq.write_table(
            pa.table({"text": texts()[number::3]}), folder / f"train-0000{number}-of-00003.parquet"
        )
    hub = ["data=hub", f"data.name={folder}", "data.path=null", "data.valid_fraction=0.2"]
    workplace.train(*EP2, *RUN, *hub, "run.id=calm")
    workplace.train(*EP2, *RUN, *hub, killer(workplace, [[5, 1], [10, 0]]))
    calm = workplace.run_dir.parent / "calm"
    assert [event["step"] for event in workplace.events("resume")] == [4, 8]
    assert workplace.digest() == workplace.digest(calm)
    assert workplace.losses() == workplace.losses(calm)


@pytest.mark.parametrize("world", [["launcher.nproc_per_node=1"], EP2], ids=["1 rank", "2 ranks"])
def test_bf16_learns_and_a_kill_changes_no_bit(workplace: Workplace, world: list[str]) -> None:
    fast = ["train.dtype=bf16", "optim.lr=1e-2", "optim.warmup_steps=2"]
    workplace.train(*world, *RUN, *fast, "run.id=calm")
    workplace.train(*world, *RUN, *fast, killer(workplace, [[9, 0]]))
    calm = workplace.run_dir.parent / "calm"
    losses = workplace.losses(calm)
    assert losses[12] < losses[1] - 0.5
    assert [event["step"] for event in workplace.events("resume")] == [8]
    assert workplace.digest() == workplace.digest(calm)
    assert workplace.losses() == losses
