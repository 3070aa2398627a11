"""kill -9 of workers changes nothing: not one bit of the weights, not one sample."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.command import Workplace
from trainer.metrics.history import History
from trainer.metrics.recovery import PARTS

STEPS, GLOBAL_BATCH = 30, 8


def callback(name: str, /, **kwargs: object) -> str:
    """An entry of ``callbacks`` in Hydra's grammar, whose keys carry no quotes."""
    values = ", ".join(f"{key}: {json.dumps(value)}" for key, value in kwargs.items())
    return f'{{target: "tests.chaos.plugins:{name}", kwargs: {{{values}}}}}'


def samples_by_step(folder: Path) -> dict[int, list[list[int]]]:
    """Each step's samples over all ranks, one entry an attempt that all ranks began."""
    ranks = [
        [json.loads(line) for line in file.read_text().splitlines()] for file in sorted(folder.iterdir())
    ]
    attempts: dict[int, list[list[int]]] = {}
    for step in range(STEPS):
        tries = [[line["samples"] for line in rank if line["step"] == step] for rank in ranks]
        last = [rank[-1] for rank in tries]
        attempts[step] = [sorted(sample for rank in last for sample in rank)]
        for rank in tries:
            assert all(again == rank[0] for again in rank), f"step {step} read other samples when redone"
    return attempts


def test_three_kills_leave_the_same_bits(workplace: Workplace) -> None:
    common = [
        "layout=deepseek",  # its router biases are state beside weights and optimizer,
        "layout.balance.scope=step",  # so are the loads of the step before,
        "layout.jitter=0.05",  # and noise must be the same when a step is done again
        "launcher.nproc_per_node=2",
        "parallel.ep=2",
        f"train.steps={STEPS}",
        "checkpoint.every=4",
        "eval.every=10",
    ]
    workplace.train(*common, "run.id=calm")
    calm = workplace.path / "runs" / "e2e" / "calm"
    chance = random.Random(0)
    kills = [[step, chance.randrange(2)] for step in sorted(chance.sample(range(1, STEPS), 3))]
    marks, seen = workplace.path / "marks", workplace.path / "seen"
    recorder = callback("RecordSamples", folder=str(seen))
    killer = callback("KillAt", folder=str(marks), at=kills)
    output = workplace.train(*common, f"callbacks=[{recorder},{killer}]")

    failures = workplace.events("failure")
    assert [event["rank"] for event in failures] == [rank for _, rank in kills]
    assert all(event["kind"] == "crash" and "SIGKILL" in event["cause"] for event in failures)
    assert len(workplace.events("restart")) == 3
    assert "SIGKILL" in output, "the user is told"
    assert workplace.digest() == workplace.digest(calm)
    assert workplace.losses() == workplace.losses(calm), "every step is logged once, with the same bits"
    assert sorted(workplace.losses()) == list(range(1, STEPS + 1))
    read = [sample for step in samples_by_step(seen).values() for sample in step[0]]
    assert sorted(read) == list(range(STEPS * GLOBAL_BATCH)), "each sample once, none missing"
    resumed = [event["step"] for event in workplace.events("resume")]
    assert all(step % 4 == 0 or step % 10 == 0 for step in resumed), "from checkpoints that were committed"
    assert_accounted(workplace, [step for step, _ in kills])


def assert_accounted(workplace: Workplace, killed_at: list[int]) -> None:
    """Every kill belongs to one recovery, whose parts are all of its time; so are the causes of the run's."""
    recoveries = workplace.events("recovered")
    assert sum(event["failures"] for event in recoveries) == len(killed_at)
    for event in recoveries:
        parts = [event[f"{part}_seconds"] for part in PARTS]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(event["seconds"])
        assert event["kind"] == "crash" and event["restart_seconds"] > 0 and event["recompute_seconds"] > 0
    history = History.load(workplace.run_dir)
    account = history.account
    first, last = workplace.events("start")[0], workplace.events("finish")[-1]
    assert account.wall == pytest.approx(last["time"] - first["time"])
    lost = sum(event["seconds"] for event in recoveries)
    spent = account.detect + account.restart + account.load + account.recompute
    # The account has the step that each kill cut off besides, which may have been as long as the longest.
    cut_off = len(killed_at) * max(record["perf/step_seconds"] for record in history.records)
    assert -0.3 <= spent - lost <= 0.3 + cut_off, "the account and the events tell of the same time"
    assert account.useful > 0 and account.other < 0.5 * account.wall
    assert last["goodput"] == pytest.approx(account.goodput, abs=0.1), "live and afterwards"


def test_a_run_that_always_dies_gives_up_and_says_why(workplace: Workplace) -> None:
    bomb = callback("KillAlways")
    output = workplace.train(f"callbacks=[{bomb}]", "train.steps=5", "resilience.max_restarts=1", expect=70)
    assert "Gave up after 1 restart(s)" in output
    assert "SIGKILL" in output
    assert "Traceback" not in output


def test_one_rank_alone_is_preempted_and_all_save_and_leave(workplace: Workplace) -> None:
    two = ["launcher.nproc_per_node=2", "parallel.ep=2", "train.steps=8"]
    for attempt in range(3):  # the race that this is about does not show every time
        options = [f"callbacks=[{callback('TerminateAt', step=3, rank=1)}]", f"run.id=t{attempt}"]
        output = workplace.train(*two, *options, expect=75)
        run_dir = workplace.path / "runs" / "e2e" / f"t{attempt}"
        assert "muster resume" in output
        assert not workplace.events("failure", run_dir)
        stops = [(e["step"], e["kind"], e["rank"], e["cause"]) for e in workplace.events("stop", run_dir)]
        assert stops == [(4, "preempted", 1, "SIGTERM")]
        assert (run_dir / "checkpoints" / "step-00000004" / "manifest.json").is_file()


def test_a_diverged_model_is_never_the_best_and_never_fails_the_run(workplace: Workplace) -> None:
    workplace.train(
        f"callbacks=[{callback('PoisonAt', step=4)}]",
        "guard=off",
        "train.steps=8",
        "eval.every=2",
        "eval.sample_tokens=4",
        "checkpoint.keep_last=1",
    )
    flags = {event["step"]: event["best"] for event in workplace.events("evaluation")}
    assert flags == {0: True, 2: True, 4: True, 6: False, 8: False}
    assert (workplace.run_dir / "checkpoints" / "best").resolve().name == "step-00000004"
    assert workplace.events("finish")[-1]["sample"] is None
    assert any("not finite" in event["message"] for event in workplace.events("alarm"))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A run whose link to the best checkpoint was lost, and that went on with a callback more."""
    workplace = Workplace(tmp_path_factory.mktemp("resumed"))
    counter = callback("Counter", name="n")
    workplace.train(f"callbacks=[{counter}]", "train.steps=4", "eval.every=2")
    link = workplace.run_dir / "checkpoints" / "best"
    link.rename(workplace.path / "was-best")
    recorder = callback("RecordSamples", folder=str(workplace.path / "seen"))
    workplace.resume(f"callbacks=[{recorder},{counter}]", "train.steps=5", "eval.every=0")
    return workplace


def test_callbacks_find_their_own_state_when_their_list_changes(resumed: Workplace) -> None:
    assert [record["user/n"] for record in resumed.records("metrics.jsonl")] == [1, 2, 3, 4, 5]
    (alarm,) = resumed.events("alarm")
    assert alarm["kind"] == "callbacks_changed"
    assert "RecordSamples" in alarm["message"]


def test_best_is_named_again_if_the_run_died_before_naming_it(resumed: Workplace) -> None:
    link = resumed.run_dir / "checkpoints" / "best"
    assert link.readlink() == (resumed.path / "was-best").readlink()
    assert link.is_dir()
