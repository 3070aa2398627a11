"""`train.profile` in a real run over two ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from tests.command import EP2, Workplace


def test_a_profile_tells_where_time_goes_and_changes_nothing(tmp_path: Path) -> None:
    workplace = Workplace(tmp_path)
    output = workplace.train(*EP2, "train.steps=4", "train.profile=2-3", "logger.terminal=plain")
    (event,) = workplace.events("profile")
    folder = workplace.run_dir / "profile" / "steps-2-3"
    assert (event["step"], event["path"]) == (3, str(folder))
    assert {"experts", "exchange", "attention", "optimizer", "data"} <= event["parts_ms"].keys()
    assert f"profile  step 3  path={folder}" in output
    files = {f"rank-0000{rank}.{kind}" for rank in (0, 1) for kind in ("json.gz", "txt")}
    assert {path.name for path in folder.iterdir()} == files, "of both: they exchange tokens"
    for rank in (0, 1):
        with gzip.open(folder / f"rank-0000{rank}.json.gz") as file:
            names = [found["name"] for found in json.load(file)["traceEvents"]]
        # Two layers: counts, rows there and home, and both again in backward; two steps.
        assert names.count("muster: exchange") == 2 * 2 * 5
        assert "muster: experts" in names and "aten::mm" in names
        text = (folder / f"rank-0000{rank}.txt").read_text()
        assert text.startswith(f"Steps 2 to 3, rank {rank}: ") and "exchange " in text and "aten::mm" in text
    profiled = workplace.digest()
    workplace.train(*EP2, "train.steps=4", "run.id=b")
    assert workplace.digest(workplace.run_dir.with_name("b")) == profiled


def test_a_profile_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    workplace = Workplace(tmp_path)
    workplace.run_dir.mkdir(parents=True)
    (workplace.run_dir / "profile").write_text("in the way")
    workplace.train("train.steps=3", "train.profile=1", "train.global_batch=2")
    (alarm,) = workplace.events("alarm")
    assert alarm["kind"] == "profile" and "rank 0 could not write its profile to " in alarm["message"]
    assert workplace.events("finish") and not workplace.events("profile")
