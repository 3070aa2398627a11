"""`muster generate` and `muster evaluate` on a real run: in one process, and with experts on two."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch import evaluate, sample
from parallel.errors import ConfigError
from tests.command import EP2, REPO, Workplace
from tests.commands.watch import assert_nothing_left


@pytest.fixture
def beside(calm: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A folder to work in, with the calm run's: copied, since an evaluation is kept in its run.

    Commands are called in this process, and the workers that they start are real.
    """
    workplace = Workplace(tmp_path)
    shutil.copytree(calm.run_dir, workplace.run_dir, symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPO), prepend=os.pathsep)
    monkeypatch.setenv("MUSTER_CACHE", workplace.environment()["MUSTER_CACHE"])
    return workplace


class Commands:
    """Both commands on the run, as from a command line; the JSON lines that they print."""

    def __init__(self, workplace: Workplace, printed: pytest.CaptureFixture[str]) -> None:
        self.run_dir, self.printed = str(workplace.run_dir), printed

    def generate(self, *arguments: str) -> list[dict[str, Any]]:
        outcome = sample.generate([self.run_dir, *arguments, "json=true"])
        assert outcome.code == 0, outcome.message
        return self._lines()

    def evaluate(self, *arguments: str) -> dict[str, Any]:
        outcome = evaluate.main([self.run_dir, *arguments, "json=true"])
        assert outcome.code == 0, outcome.message
        (answer,) = self._lines()
        return answer

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.printed.readouterr().out.splitlines() if line[0] == "{"]


def test_the_same_texts_from_one_process_and_from_two(
    beside: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["def main(", "import", "  "]
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    (beside.path / "prompts.jsonl").write_text("\n".join(lines))
    commands = Commands(beside, capsys)
    options = ["prompts_file=prompts.jsonl", "max_new_tokens=40", "num_samples=2", "top_k=50", "seed=1"]
    alone = commands.generate(*options)
    assert [(text["prompt"], text["sample"]) for text in alone] == [(p, n) for p in prompts for n in (0, 1)]
    assert alone[0]["text"] != alone[1]["text"]
    assert any(text["num_tokens"] == 40 for text in alone), "longer than the 32 tokens of a training row"
    assert commands.generate(*options, *EP2, "batch_size=2") == alone
    (first,) = commands.generate("prompt=import", *options[1:2], *options[3:])
    assert first == alone[2]
    assert_nothing_left(beside)


def test_the_loss_on_other_text_from_one_process_and_from_two(
    beside: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = Commands(beside, capsys)
    data = ["data=text", f"data.path={beside.path / 'corpus' / 'glob.txt'}", "eval.max_rows=37"]
    alone = commands.evaluate(*data)
    together = commands.evaluate(*data, "launcher.nproc_per_node=2", "train.micro_batch=5")
    assert alone["num_rows"] == together["num_rows"] == 37 and alone["step"] == 12
    assert together["num_tokens"] == alone["num_tokens"] == 37 * 32, "one document: each token is a target"
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert together[name] == pytest.approx(alone[name], rel=1e-6)
    assert 0 < alone["bits_per_byte"] < alone["loss"] / 0.69
    assert evaluate.main([commands.run_dir, *data]).code == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"loss           {alone['loss']:.4f} nats a token"
    assert shown[3] == "tokens         1,184 in 37 rows (eval.max_rows=0 reads all)"
    *kept, _ = (beside.run_dir / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == [alone, together]
    assert_nothing_left(beside)


def test_what_is_wrong_is_said(beside: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = str(beside.run_dir)
    for arguments, message in (
        (["launcher.nproc_per_node=2", "parallel.ep=3"], "which it must divide"),
        (["launcher.nnodes=2"], "processes of one node"),
        (["data=text"], "data.path"),
        (["limit=3"], "is for tasks="),
        (["tasks=a", "data=text"], "bring their own data"),
        (["task=a"], "did you mean tasks="),
        (["eval.max_row=3"], "no such key"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate.main([run_dir, *arguments])
    # The run's own rows are those of the corpus that it was trained on.
    config = beside.run_dir / "config.yaml"
    corpus = re.sub(r"path: .*/corpus", f"path: {beside.path / 'corpus'}", config.read_text())
    config.write_text(corpus)
    (beside.path / "corpus" / "csv.txt").write_text("Another text.\n" * 1000)
    with pytest.raises(ConfigError, match="not any more what this run was trained on"):
        evaluate.main([run_dir])
    # What only the ranks find is said once, with the code of the user's mistakes.
    (beside.run_dir / "tokenizer.json").write_text("{}")
    outcome = sample.generate([run_dir, *EP2])
    assert outcome.code == 2 and outcome.message.count("is not a readable tokenizer") == 1
    assert_nothing_left(beside)


def test_tasks_of_the_harness(beside: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"lm-eval, which cannot be imported.*muster-moe\[eval\]"):
            evaluate.main([str(beside.run_dir), "tasks=opposites"])
        return
    shutil.copytree(REPO / "tests" / "tasks", beside.path / "tasks")
    commands = Commands(beside, capsys)
    tasks = ["tasks=opposites,counting,plain_text", "include_path=tasks"]
    alone, together = commands.evaluate(*tasks)["tasks"], commands.evaluate(*tasks, *EP2)["tasks"]
    assert alone.keys() == {"opposites", "counting", "plain_text"}
    for task, metrics in alone.items():
        assert together[task] == pytest.approx(metrics, rel=1e-4)
    assert alone["plain_text"]["bits_per_byte"] > 1
