import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from metrics_helpers import step

from trainer.metrics.jsonl import Follow, JsonlWriter, metrics_writer, read_events, read_metrics


def steps_of(records: list[dict[str, object]]) -> list[object]:
    return [record["step"] for record in records]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    record = step(1, 0.0, **{"loss/valid": math.inf, "grad_norm": math.nan, "user/a": -math.inf})
    with metrics_writer(tmp_path) as writer:
        writer.write(record | {"moe/L0/load": torch.tensor([0.25, 0.75]), "loss/train": np.float32(1.5)})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert read["loss/valid"] == math.inf and read["user/a"] == -math.inf and math.isnan(read["grad_norm"])
    assert read["moe/L0/load"] == [0.25, 0.75] and read["loss/train"] == 1.5


def test_metrics_writer_checks_names_before_it_writes(tmp_path: Path) -> None:
    with (
        metrics_writer(tmp_path) as writer,
        pytest.raises(AssertionError, match="not in trainer/metrics/schema"),
    ):
        writer.write(step(1, 0.0, typo=1.0))
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_missing_files_are_empty_runs(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none") == [] and read_events(tmp_path / "none") == []


def test_a_torn_last_line_is_not_read_and_not_joined(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert steps_of(read_metrics(path)) == [1, 2]
    with JsonlWriter(path) as writer:
        writer.write({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_broken_line_inside_is_skipped_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.warns(UserWarning, match=r"m\.jsonl:2: not a JSON object"):
        assert steps_of(read_metrics(path)) == [1, 3]


def test_a_killed_writer_loses_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.metrics.jsonl import JsonlWriter\n"
        "w = JsonlWriter(Path(sys.argv[1]))\n"
        "for s in range(1, 50): w.write({'step': s})\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.jsonl")])
    assert done.returncode == -signal.SIGKILL
    assert steps_of(read_metrics(tmp_path / "m.jsonl")) == list(range(1, 50))


def test_truncate_after_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with JsonlWriter(path) as writer:
        for number in range(1, 11):
            writer.write({"step": number})
        inode = path.stat().st_ino
        assert writer.truncate_after(10) == 0 and path.stat().st_ino == inode
        assert writer.truncate_after(6) == 4
        writer.write({"step": 7, "again": True})
    assert steps_of(read_metrics(path)) == [1, 2, 3, 4, 5, 6, 7]
    assert list(tmp_path.iterdir()) == [path]


def test_disk_full_raises_and_the_file_stays_readable(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    writer.write({"step": 1})
    # A limit on the file's size makes a write short and the next one fail, as a full disk does.
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, old[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            writer.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    writer.write({"step": 3})
    writer.close()
    with pytest.warns(UserWarning, match="not a JSON object"):
        assert steps_of(read_metrics(path)) == [1, 3]


def test_of_a_step_logged_twice_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "time": 1}\n{"step": 2, "time": 2}\n{"step": 2, "time": 9}\n')
    assert [record["time"] for record in read_metrics(path)] == [1, 9]


def test_follow_sees_each_record_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    follow = Follow(path)
    assert follow.poll() == []
    writer = JsonlWriter(path)
    writer.write({"step": 1})
    assert steps_of(follow.poll()) == [1] and follow.poll() == []
    with path.open("ab") as torn:
        torn.write(b'{"step"')
        torn.flush()
        assert follow.poll() == []
        torn.write(b": 2}\n")
        torn.flush()
        assert steps_of(follow.poll()) == [2]
    writer.close()


@pytest.mark.parametrize("seen", [0, 3, 5, 8])
def test_follow_survives_truncation(tmp_path: Path, seen: int) -> None:
    path = tmp_path / "m.jsonl"
    follow, writer = Follow(path), JsonlWriter(path)
    for number in range(1, 9):
        writer.write({"step": number, "generation": 0})
        if number == seen:
            assert len(follow.poll()) == seen
    writer.truncate_after(5)
    writer.write({"step": 6, "generation": 1})
    new = [(record["step"], record["generation"]) for record in follow.poll()]
    assert new == [(number, 0) for number in range(seen + 1, 6)] + [(6, 1)]
    writer.truncate_after(4)
    assert follow.poll() == []
    writer.write({"step": 5, "generation": 2})
    assert [(record["step"], record["generation"]) for record in follow.poll()] == [(5, 2)]
    writer.close()
