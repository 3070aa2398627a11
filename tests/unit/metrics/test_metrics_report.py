import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from metrics_helpers import event, failure, finish, moe, recovered, restart, resume, start, step, write

from parallel.errors import ConfigError
from trainer.metrics.history import History
from trainer.metrics.plots import MAX_POINTS, Line, downsample, line_plot
from trainer.metrics.recovery import PARTS
from trainer.metrics.report import render, write_report
from trainer.metrics.text import bytes_text, count_text, seconds_text


class Page(HTMLParser):
    """Checks that what is opened is closed, and collects links, tags and text."""

    VOID = ("meta", "br", "path", "use", "image", "rect", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")
        ]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def moe_run(run: Path) -> Path:
    events = [
        start(0.0), event("evaluation", 1.0, 0, loss_valid=8.3, best=True), failure(6.0, 5, "<b>hang</b>"),
        start(8.0, 1), restart(8.0, 4, 1, 2.0, 1), resume(8.5, 4),
        event("evaluation", 15.0, 10, loss_valid=3.5, best=True), finish(16.0, 10),
    ]  # fmt: skip
    records = [step(n, 1.0 + n + (4 if n > 4 else 0)) | moe() for n in range(1, 11)]
    records[6]["loss/train"] = math.nan
    records[7]["grad_norm"] = math.inf
    write(run, events, records)
    (run / "config.yaml").write_text("run:\n  name: <script>alert(1)</script>\n")
    return run


def test_report_of_a_moe_run(tmp_path: Path) -> None:
    run = moe_run(tmp_path / "quick" / "a1")
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for part in ("quick/a1", "finished", "Loss", "Expert load", "layer 0", "layer 1",
                 "Experts without a token", "Throughput", "Model FLOPs utilisation", "Gradient norm",
                 "Learning rate", "Goodput 62.5%",
                 "untrained 8.30", "unigram 6.00", "1 step with a loss that is not finite",
                 "No routed pair was ever dropped", "def f(x): return <x> & y", "config.yaml"):  # fmt: skip
        assert part in page.text, part
    # Text of the run is escaped: it is read as text, and never as a tag.
    assert "<script>alert(1)</script>" in page.text and "<script" not in text
    assert "<b>hang</b>" in page.text and "<b>hang" not in text


def test_recoveries_by_kind_with_their_parts(tmp_path: Path) -> None:
    parts = {f"{part}_seconds": second for part, second in zip(PARTS, (0.5, 1.0, 0.25, 0.25), strict=True)}
    events = [start(0.0)]
    for number in range(1, 11):
        kind = "hang" if number == 10 else "crash"
        slow = parts | {"detect_seconds": 5.0} if kind == "hang" else parts
        events += [
            failure(10.0 * number, number, kind),
            recovered(10.0 * number + 8, number, number, kind, **slow),
        ]
    page = Page(render(History.load(write(tmp_path / "r", events, [step(1, 1.0)]))))
    assert "Recovery: 10" in page.text and "Median 2.0 s, p99 6.5 s, longest 6.5 s" in page.text
    rows = re.findall(r"(crash|hang|all)(\d+)((?:\d+\.\d s)+)", page.text)
    assert ("crash", "9", "0.5 s1.0 s0.2 s0.2 s2.0 s2.0 s") in rows
    assert ("hang", "1", "5.0 s1.0 s0.2 s0.2 s6.5 s6.5 s") in rows and rows[-1][:2] == ("all", "10")
    assert "recovered" in page.text and "from hang after 6.5 s: detect 5.0 s" in page.text


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    text = write_report(moe_run(tmp_path / "r")).read_text(encoding="utf-8")
    links = Page(text).links
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"@import|url\((?!#)", text)
    # Every reference inside a picture has its target, although most ids are dropped.
    ids = set(re.findall(r' id="([^"]+)"', text))
    assert set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text)) <= ids
    assert "var(--ink)" in text and "#010101" not in text


def test_a_dense_run_has_no_expert_panels(tmp_path: Path) -> None:
    run = write(tmp_path / "r", [start(0.0)], [step(n, float(n)) for n in (1, 2, 3)])
    text = Page(render(History.load(run))).text
    assert "Throughput" in text and "running" in text
    assert "Expert load" not in text and "Routing" not in text and "config.yaml" not in text


@pytest.mark.parametrize(
    "values", [{}, {"loss/train": math.nan, "grad_norm": math.nan, "perf/mfu": math.inf}]
)
def test_a_single_record(tmp_path: Path, values: dict[str, float]) -> None:
    run = write(tmp_path / "r", [start(0.0)], [step(1, 1.0) | moe() | values])
    assert "Expert load" in Page(render(History.load(run))).text


def test_a_run_without_a_step(tmp_path: Path) -> None:
    run = write(tmp_path / "r", [start(0.0)], [])
    assert "No step was logged yet" in Page(render(History.load(run))).text


def test_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a run directory holds events\.jsonl and metrics\.jsonl"):
        write_report(tmp_path)


def test_state_follows_the_last_event(tmp_path: Path) -> None:
    events = [start(0.0), failure(1.0, 1), start(2.0, 1), finish(3.0, 2), start(4.0, 2)]
    states = [History(tmp_path, [], events[:count]).state for count in range(1, 6)]
    assert states == ["running", "failed", "running", "finished", "running"]
    assert History(tmp_path, [], events).finish == {}


def test_long_runs_are_reduced() -> None:
    steps = np.arange(1.0, 50_001.0)
    values = np.sin(steps / 3000)
    values[100], values[200] = 50.0, np.nan
    x, mean, low, high = downsample(steps, values)
    assert len(x) == len(mean) == len(low) == len(high) <= MAX_POINTS
    assert x[-1] == steps[-1] and high.max() == 50.0 and np.isfinite(mean).all()
    assert (low <= mean).all() and (mean <= high).all()
    assert len(line_plot([Line(steps, values, smooth=True)], unit="", size=(6.0, 2.0))) < 400_000


def test_downsample_keeps_short_runs_and_gaps() -> None:
    values = np.array([1.0, np.nan, 3.0])
    x, mean, low, high = downsample(np.array([1.0, 2.0, 3.0]), values)
    assert x.tolist() == [1.0, 2.0, 3.0]
    for got in (mean, low, high):
        np.testing.assert_array_equal(got, values)


def test_numbers_read_well() -> None:
    assert [count_text(v) for v in (0, 950, 999.6e3, 12345, 4.56e6, 671e9)] == [
        "0", "950", "1.00M", "12.3k", "4.56M", "671B",
    ]  # fmt: skip
    assert [seconds_text(v) for v in (4.25, 42, 59.7, 190, 7500, 273600)] == [
        "4.2 s", "42 s", "1m 00s", "3m 10s", "2h 05m", "3d 04h",
    ]  # fmt: skip
    assert [bytes_text(v) for v in (950, 1.1e8, 4.56e9)] == ["950 B", "110 MB", "4.56 GB"]
