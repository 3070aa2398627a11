"""Ctrl-C, SIGTERM and a killed agent: what was saved is kept, and nothing is left running."""

from __future__ import annotations

import signal
import subprocess

import pytest

from tests.command import CALM, MUSTER, SMALL, Workplace
from tests.commands.plugins import entry
from tests.commands.watch import assert_nothing_left, checkpoints_of, digest_of_checkpoint
from tests.grid import some

STOP_AT = 8


def train_with(workplace: Workplace, callback: str, *overrides: str) -> tuple[int, str]:
    """Exit code and output of a `muster train` in a session of its own, as on a terminal."""
    command = ["setsid", MUSTER, "train", *SMALL, f"data.path={workplace.path / 'corpus'}", *CALM, *overrides]
    process: subprocess.Popen[str] = workplace.start(*command, f"callbacks=[{callback}]")
    output, _ = process.communicate(timeout=600)
    assert "Traceback" not in output, output
    assert_nothing_left(workplace)
    return process.returncode, output


def signal_agent(workplace: Workplace, number: int, **options: object) -> str:
    """The callback's config entry."""
    mark = str(workplace.path / "signalled")
    return entry("SignalAgent", step=STOP_AT - 1, number=int(number), mark=mark, **options)


@pytest.mark.parametrize("number", some([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM]))
def test_a_stop_saves_and_leaves_a_resumable_run(
    workplace: Workplace, calm: Workplace, number: signal.Signals
) -> None:
    code, output = train_with(workplace, signal_agent(workplace, number), "checkpoint.every=0")
    assert code == 75, output
    assert f"{number.name}: saving, then stopping" in output
    assert f"Stopped and saved. Go on from step {STOP_AT}:" in output
    assert f"muster resume {workplace.run_dir}" in output
    assert checkpoints_of(workplace.run_dir) == [f"step-{STOP_AT:08d}"]
    assert digest_of_checkpoint(workplace.run_dir, STOP_AT) == digest_of_checkpoint(calm.run_dir, STOP_AT)
    assert workplace.events("stop")[-1]["step"] == STOP_AT
    if number == signal.SIGINT:
        workplace.resume()
        assert workplace.digest() == calm.digest()
        assert workplace.losses() == calm.losses()
        assert [event["step"] for event in workplace.events("resume")] == [STOP_AT]


def test_the_second_interrupt_does_not_wait(workplace: Workplace) -> None:
    callback = signal_agent(workplace, signal.SIGINT, again=True)
    code, output = train_with(workplace, callback, "checkpoint.every=3")
    assert code == 75, output
    assert "Stopping at once." in output
    assert "Stopped without saving. Go on from step 6:" in output
    assert checkpoints_of(workplace.run_dir) == ["step-00000003", "step-00000006"]


def test_killing_the_agent_leaves_no_worker_and_no_lock(workplace: Workplace, calm: Workplace) -> None:
    offline = "logger.wandb.mode=offline"  # its service process must go, too
    code, _ = train_with(workplace, signal_agent(workplace, signal.SIGKILL), "checkpoint.every=4", offline)
    assert code == -signal.SIGKILL
    workplace.resume()
    assert workplace.digest() == calm.digest()
    assert_nothing_left(workplace)
    offline_runs = [path.name for path in (workplace.run_dir / "wandb").glob("offline-run-*")]
    assert len(offline_runs) == 2
    assert len({name.split("-", 3)[3] for name in offline_runs}) == 1, "the same W&B run, by its id"


def test_a_stop_saves_when_nobody_reads_what_is_said(workplace: Workplace) -> None:
    """As when a terminal is closed, or the connection that carries the output is lost."""
    overrides = [*CALM, "checkpoint.every=0", "logger.terminal=off"]
    overrides.append(f"callbacks=[{signal_agent(workplace, signal.SIGTERM)}]")
    data = f"data.path={workplace.path / 'corpus'}"
    process = workplace.start("setsid", MUSTER, "train", *SMALL, data, *overrides)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=600) == 75
    assert checkpoints_of(workplace.run_dir) == [f"step-{STOP_AT:08d}"]
    assert_nothing_left(workplace)
