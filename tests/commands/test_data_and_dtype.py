"""Other data and other precision, killed on the way: the same weights as without the kill."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.command import EP2, Workplace
from tests.commands.plugins import entry

RUN = ["train.steps=12", "checkpoint.every=4"]
BF16 = ["train.dtype=bf16", "optim.lr=1e-2", "optim.warmup_steps=2"]
"""Fast enough that 12 steps show that it learns."""


def texts() -> list[str]:
    """Real text, two documents a file."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "csv", "glob", "shlex", "textwrap", "inspect", "difflib")
    whole = [(stdlib / f"{name}.py").read_text() for name in names]
    return [part for text in whole for part in (text[: len(text) // 2], text[len(text) // 2 :])]


def killer(workplace: Workplace, at: list[list[int]]) -> str:
    """The override that kills ranks at (step, rank)."""
    marks = str(workplace.path / "marks")
    return f"callbacks=[{entry('tests.chaos.plugins:KillAt', folder=marks, at=at, every=4)}]"


def check_killed(workplace: Workplace, resumed_from: list[int]) -> None:
    """The run was killed and learned; the run ``calm``, which was not, has the same bits."""
    calm = workplace.run_dir.parent / "calm"
    losses = workplace.losses(calm)
    assert losses[12] < losses[1] - 0.5
    assert len(workplace.events("failure")) == len(resumed_from)
    assert [event["step"] for event in workplace.events("resume")] == resumed_from
    assert workplace.digest() == workplace.digest(calm)
    assert workplace.losses() == losses


@pytest.mark.long
def test_the_same_documents_as_jsonl_and_as_parquet_in_bf16_on_two_ranks(workplace: Workplace) -> None:
    lines, table = workplace.path / "texts.jsonl", workplace.path / "texts.parquet"
    lines.write_text("".join(json.dumps({"content": text}) + "\n" for text in texts()))
    pq.write_table(pa.table({"content": texts()}), table)
    common = [*EP2, *RUN, *BF16, "data.text_field=content"]
    workplace.train(*common, "data=jsonl", f"data.path={lines}", "run.id=calm")
    workplace.train(*common, "data=parquet", f"data.path={table}", killer(workplace, [[6, 0]]))
    check_killed(workplace, [4])


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


@pytest.mark.long
def test_bf16_learns_and_a_kill_changes_no_bit_on_one_rank(workplace: Workplace) -> None:
    workplace.train(*RUN, *BF16, "run.id=calm")
    workplace.train(*RUN, *BF16, killer(workplace, [[9, 0]]))
    check_killed(workplace, [8])
