"""The main job as a newcomer runs it: `muster train experiment=quickstart`, half of it or (long) all."""

from __future__ import annotations

import re

import pytest

from tests.command import MUSTER, Workplace
from tests.grid import some


@pytest.mark.parametrize("fewer", some([["train.steps=80"], []], [["train.steps=80"]]), ids=["half", "all"])
def test_quickstart_learns_and_leaves_everything_a_user_was_promised(
    workplace: Workplace, fewer: list[str]
) -> None:
    output = workplace.run(MUSTER, "train", "experiment=quickstart", "run.id=main", *fewer)
    run_dir = workplace.path / "runs" / "quickstart" / "main"
    finish = workplace.events("finish", run_dir)[-1]

    assert finish["loss_valid"] <= finish["unigram_loss"] - 1.0, "a nat below the unigram model"
    assert finish["loss_valid"] < finish["loss_valid_untrained"] - 2.0
    assert finish["sample"]["text"].strip()
    assert re.fullmatch(r"[0-9a-f]{32}", finish["weights_digest"])
    best = run_dir / "checkpoints" / "best"
    assert best.is_symlink()
    assert (best / "manifest.json").is_file()

    steps = [record["step"] for record in workplace.records("metrics.jsonl", run_dir)]
    assert steps == list(range(1, max(steps) + 1))
    last = workplace.records("metrics.jsonl", run_dir)[-1]
    for name in ("loss/train", "loss/valid", "loss/balance", "perf/mfu", "moe/a2a_bytes", "ft/goodput"):
        assert name in last
    for layer in range(4):
        load = last[f"moe/L{layer}/load"]
        assert len(load) == 8
        assert sum(load) == pytest.approx(1.0)

    report = (run_dir / "report.html").read_text()
    assert "<svg" in report
    assert not re.search(r"""(?:src|href)=["']https?:""", report), "self-contained"
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    for shown in ("valid loss", "unigram", "report.html", "wandb sync", finish["sample"]["prompt"]):
        assert shown in output
    assert "Traceback" not in output
