import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from metrics_helpers import failure, finish, moe, step

from trainer.metrics.wandb_sink import WandbSink, sync_hint


def open_sink(run_dir: Path, alarms: list[tuple[str, str]], mode: str = "offline") -> WandbSink:
    return WandbSink(
        run_dir, mode=mode, run_id="abc123", project="muster-test", name="quick/a1", group="sweep",
        config={"train": {"steps": 3}}, on_alarm=lambda kind, message: alarms.append((kind, message)),
    )  # fmt: skip


def read_back(directory: Path) -> list[dict[str, object]]:
    """Records of an offline run's file, by W&B's own reader."""
    (file,) = directory.glob("*.wandb")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(file)]
    text = subprocess.run(
        command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout
    return [json.loads(line) for line in text.splitlines()]


def test_offline_run_over_a_restart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    alarms: list[tuple[str, str]] = []
    sink = open_sink(tmp_path, alarms)
    for number in (1, 2):
        sink.metrics(step(number, float(number)) | moe(layers=1, experts=1024))
    sink.event(failure(2.5, 2))
    sink.close(exit_code=1)
    # A rollback: step 2 again, in a second process or the same one.
    sink = open_sink(tmp_path, alarms)
    sink.metrics(step(2, 5.0) | {"loss/train": 1.25})
    sink.event(finish(6.0, 2))
    sink.close()

    assert alarms == []
    assert capfd.readouterr() == ("", "")
    directories, command = sync_hint(tmp_path)
    named = re.compile(r".*-abc123(-1)?")  # W&B adds a number where two begin in one second
    assert len(directories) == 2 and all(named.fullmatch(path.name) for path in directories)
    assert command == f"wandb sync {directories[0]} {directories[1]}"
    first, second = (json.dumps(read_back(path)) for path in directories)
    for key in ("loss/train", "moe/L0/load", "histogram", "muster-test", "sweep", "failure"):
        assert key in first
    for key in ("weights_digest", "1.25", "step_metric", '"resume": true'):
        assert key in second


def test_disabled_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.metrics.wandb_sink import WandbSink\n"
        "s = WandbSink(Path(sys.argv[1]), mode='disabled',"
        " run_id='a', project='p', name='n', on_alarm=print)\n"
        "s.metrics({'step': 1}); s.event({'event': 'finish'}); s.close()\n"
        "assert not [m for m in sys.modules if m.split('.')[0] == 'wandb']"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == [] and sync_hint(tmp_path) == ([], None)


def test_a_failure_in_wandb_is_told_once_and_survived(tmp_path: Path) -> None:
    alarms: list[tuple[str, str]] = []
    sink = open_sink(tmp_path, alarms)
    sink.metrics(step(1, 1.0) | {"user/bad": object()})
    sink.metrics(step(2, 2.0))
    sink.event(finish(3.0, 2))
    sink.close()
    assert len(alarms) == 1
    assert alarms[0][0] == "wandb" and "metrics.jsonl is complete" in alarms[0][1]


def test_online_without_a_login_goes_on_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    alarms: list[tuple[str, str]] = []
    sink = open_sink(tmp_path, alarms, mode="online")
    sink.metrics(step(1, 1.0))
    sink.close()
    assert len(alarms) == 1 and "no stored login" in alarms[0][1]
    assert len(sync_hint(tmp_path)[0]) == 1


def test_sync_hint_quotes_paths(tmp_path: Path) -> None:
    run = tmp_path / "my run" / "wandb" / "offline-run-1-abc"
    run.mkdir(parents=True)
    assert sync_hint(tmp_path / "my run")[1] == f"wandb sync '{run}'"
    shutil.rmtree(run)
