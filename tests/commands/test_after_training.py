"""What a finished run is good for: its best checkpoint, text, a report; and the commands without a run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.command import EP2, MUSTER, Workplace
from tests.commands.watch import assert_one_error, checkpoints_of, path_with_muster


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A run whose validation loss rises again: its learning rate grows far too high."""
    workplace = Workplace(tmp_path_factory.mktemp("finished"))
    workplace.train(
        "optim.lr=4",
        "optim.warmup_steps=20",
        "optim.max_grad_norm=0",
        "train.steps=20",
        "eval.every=2",
        "checkpoint.every=3",
        "checkpoint.keep_last=2",
        "checkpoint.keep_every=9",
    )
    return workplace


def test_the_best_checkpoint_and_those_that_rules_keep_stay(trained: Workplace) -> None:
    losses = {e["step"]: e["loss_valid"] for e in trained.events("evaluation") if e["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best < 16, "else the rules keep it anyway and this test shows nothing"
    folder = trained.run_dir / "checkpoints"
    assert (folder / "best").readlink() == Path(f"step-{best:08d}")
    finish = trained.events("finish")[-1]
    assert (finish["best_step"], finish["best_loss"]) == (best, losses[best])
    saved = {event["step"] for event in trained.events("checkpoint")}
    last_two = sorted(saved)[-2:]
    kept = sorted({best, *last_two, *(step for step in saved if step % 9 == 0)})
    assert len(kept) < len(saved)
    assert checkpoints_of(trained.run_dir) == [f"step-{step:08d}" for step in kept]


def test_generate(trained: Workplace) -> None:
    options = ["prompt=def main(", "max_new_tokens=5", "seed=1"]
    text = trained.run(MUSTER, "generate", str(trained.run_dir), *options)
    assert text.startswith("def main(") and len(text) > len("def main(\n")
    best = str(trained.run_dir / "checkpoints" / "best")
    assert trained.run(MUSTER, "generate", best, *options).startswith("def main(")
    output = trained.run(MUSTER, "generate", best, "temprature=1", expect=2)
    assert_one_error(output, "temprature=1", "is no option", "did you mean temperature")
    output = trained.run(MUSTER, "generate", str(trained.path / "corpus"), expect=2)
    assert_one_error(output, "is not a run directory")


def test_evaluate_repeats_the_loss_of_the_run(trained: Workplace) -> None:
    finish = trained.events("finish")[-1]
    best = str(trained.run_dir / "checkpoints" / "best")
    output = trained.run(MUSTER, "evaluate", best, *EP2, "json=true")
    found = json.loads(output.splitlines()[-1])
    assert (found["step"], found["num_rows"]) == (finish["best_step"], 16)
    assert found["loss"] == pytest.approx(finish["best_loss"], rel=1e-5)


def test_report(trained: Workplace) -> None:
    assert not (trained.run_dir / "report.html").exists(), "logger.report=false"
    assert trained.run(MUSTER, "report", str(trained.run_dir)).strip() == f"{trained.run_dir}/report.html"
    page = (trained.run_dir / "report.html").read_text()
    assert "<svg" in page or "data:image" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and 'src="http' not in page


def test_doctor(trained: Workplace) -> None:
    output = trained.run(MUSTER, "doctor")
    assert "gloo" in output and output.rstrip().endswith("Ready to train.")


def test_the_installed_script_completes(trained: Workplace) -> None:
    script = (
        'eval "$(muster completion bash)"\n'
        'COMP_LINE="muster train layout=de" COMP_POINT=22 COMP_WORDS=(muster train layout=de) COMP_CWORD=2\n'
        '_muster_complete; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=trained.path,
        env={**os.environ, "PATH": path_with_muster()},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "deepseek dense\n", done.stderr
