"""`muster chaos`: faults strike a real run, and the verdict says what became of them, also when it is bad."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.command import CALM, MUSTER, SMALL, Workplace
from tests.commands.watch import assert_nothing_left, wait_until

RUN = [*CALM, "train.steps=22", "checkpoint.every=3"]


def chaos(workplace: Workplace, *overrides: str, expect: int = 0) -> str:
    """`muster chaos` of the small model."""
    return workplace.run(
        MUSTER, "chaos", *SMALL, f"data.path={workplace.path / 'corpus'}", *RUN, *overrides, expect=expect
    )


def verdict(workplace: Workplace, name: str) -> dict[str, Any]:
    return json.loads((workplace.path / "runs" / "e2e" / name / "verdict.json").read_text())


def write_schedule(workplace: Workplace, *faults: tuple[int, int, str, str]) -> Path:
    path = workplace.path / "schedule.jsonl"
    names = ("step", "rank", "kind", "point")
    path.write_text("".join(json.dumps(dict(zip(names, fault, strict=True))) + "\n" for fault in faults))
    return path


@pytest.fixture(scope="module")
def struck(shared_workplace: Workplace) -> tuple[Workplace, str]:
    """A run under a schedule of faults of different kinds, and what the command printed."""
    schedule = write_schedule(
        shared_workplace,
        (3, 1, "segfault", "exchange"),
        (8, 0, "holed-shard", "batch"),
        (12, 1, "preempt", "after_optimizer"),
        (15, 0, "slow", "forward"),
        (19, 1, "bit-flip-weights", "after_optimizer"),
    )
    return shared_workplace, chaos(shared_workplace, f"chaos.schedule={schedule}")


def test_faults_are_survived_and_change_no_bit(struck: tuple[Workplace, str]) -> None:
    workplace, output = struck
    found = verdict(workplace, "a")
    assert (found["injected"], found["survived"], found["bit_identical"]) == (5, 5, True)
    assert workplace.digest() == workplace.digest(workplace.path / "runs" / "e2e" / "a-reference")
    assert [fault["detected"] for fault in found["faults"][:3]] == ["crash", "crash", "preempted"]
    assert [found["faults"][index]["step"] for index in (0, 2, 3, 4)] == [3, 12, 15, 19]
    assert found["faults"][1]["step"] >= 8, "it waits until there are two checkpoints"
    assert found["faults"][4]["detected"] == "corruption"
    assert found["commands"] == 2, "once more after the preemption"
    assert found["recovery_seconds"]["median"] > 0
    assert found["by_kind"]["segfault"]["injected"] == 1
    assert "step 4  rank 1  segfault at exchange" in output
    assert "bit-identical  yes" in output
    assert_nothing_left(workplace)


def test_a_damaged_checkpoint_was_passed_over(struck: tuple[Workplace, str]) -> None:
    workplace, _ = struck
    alarms = [event["kind"] for event in workplace.events("alarm")]
    assert "corrupt_checkpoint" in alarms


def test_a_fault_that_nothing_guards_against_is_found_out(struck: tuple[Workplace, str]) -> None:
    workplace, _ = struck
    schedule = write_schedule(workplace, (5, 1, "bit-flip-exchange", "exchange"))
    reference = workplace.path / "runs" / "e2e" / "a-reference"
    again = [f"chaos.schedule={schedule}", f"chaos.reference={reference}", "run.id=flipped"]
    output = chaos(workplace, *again, expect=1)
    found = verdict(workplace, "flipped")
    assert (found["injected"], found["survived"], found["bit_identical"]) == (1, 1, False)
    assert "Not identical: loss/train of step " in output
    assert "bit-identical  NO" in output


def test_what_cannot_be_compared(struck: tuple[Workplace, str]) -> None:
    workplace, _ = struck
    reference = f"chaos.reference={workplace.path / 'runs' / 'e2e' / 'a-reference'}"
    output = chaos(workplace, reference, "chaos.kinds=[kill]", "run.id=b", "optim.lr=1e-2", expect=2)
    assert "was trained with optim.lr=0.001, this config has 0.01" in output


@pytest.mark.long
def test_a_stop_leaves_nothing_running_and_the_same_command_goes_on(struck: tuple[Workplace, str]) -> None:
    workplace, _ = struck
    schedule = write_schedule(workplace, (4, 0, "deadlock", "forward"), (8, 1, "kill", "forward"))
    reference = workplace.path / "runs" / "e2e" / "a-reference"
    again = [f"chaos.schedule={schedule}", f"chaos.reference={reference}", "run.id=stopped"]
    command = [MUSTER, "chaos", *SMALL, f"data.path={workplace.path / 'corpus'}", *RUN, *again]
    process = workplace.start(*command)
    run = workplace.path / "runs" / "e2e" / "stopped"
    wait_until((run / "faults" / "0000.json").exists, "the first fault, which hangs")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 75, output
    assert_nothing_left(workplace)
    assert not (run / "verdict.json").exists()
    chaos(workplace, *again, "run.resume=true")
    found = verdict(workplace, "stopped")
    assert (found["injected"], found["survived"], found["bit_identical"]) == (2, 2, True)
