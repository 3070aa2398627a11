import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from metrics_helpers import checkpoint, event, failure, finish, moe, restart, resume, start, step, write
from rich.console import Console

from trainer.metrics.live import State, heat_color, heat_strip, render
from trainer.metrics.summary import final_summary
from trainer.metrics.terminal import TerminalView


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(total_steps: int, clock: Clock) -> tuple[TerminalView, io.StringIO]:
    text = io.StringIO()
    return TerminalView("plain", total_steps, Console(file=text, width=40), clock=clock), text


def test_plain_lines_are_limited_but_first_and_last_always_come() -> None:
    clock = Clock()
    view, text = plain(10, clock)
    for number in range(1, 11):
        view.metrics(step(number, float(number)))
        clock.now += 0.5
    view.close()
    shown = [line.split()[1] for line in text.getvalue().splitlines()]
    assert shown == ["1/10", "5/10", "9/10", "10/10"]


def test_plain_line_is_stable_and_never_wrapped() -> None:
    view, text = plain(400, Clock())
    view.metrics(step(120, 0.0) | {"loss/valid": 4.5, "moe/max_over_mean": 1.25, "loss/train": float("nan")})
    view.event(failure(1.0, 120))
    line, failed = text.getvalue().splitlines()
    assert line == (
        "step 120/400  loss nan  valid 4.500  tok/s 512  mfu 41.0%  grad 1.5  lr 1.00e-03  max/mean 1.25"
    )
    assert failed == "failure  step 120  kind=crash rank=1 host=node-0 cause=SIGKILL <1>"


def test_the_last_step_before_a_stop_is_shown() -> None:
    view, text = plain(100, Clock())
    view.metrics(step(1, 0.0))
    view.metrics(step(2, 1.0))
    view.close()
    view.close()
    last = text.getvalue().splitlines()[-1]
    assert last.startswith("step 2/100") and last.endswith("eta 1m38s")


def test_auto_is_plain_without_a_terminal() -> None:
    assert not TerminalView("auto", 1, Console(file=io.StringIO())).rich
    assert TerminalView("auto", 1, Console(file=io.StringIO(), force_terminal=True)).rich


def filled(layers: int = 2, experts: int = 4) -> State:
    state = State(total_steps=10)
    state.event(start(0.0))
    state.event(event("evaluation", 1.0, 0, loss_valid=8.3, best=True))
    state.record(step(4, 5.0) | moe(layers, experts), eta=6.0)
    state.event(failure(6.0, 4))
    for number in (5, 6, 7, 8):
        state.event(checkpoint(float(number), number, 0.1))
        state.event(event("evaluation", float(number), number, loss_valid=4.0, best=True))
    return state


def test_the_live_view_shows_what_matters() -> None:
    text = "\n".join(line.plain for line in render(filled(), 96, 30))
    for part in ("layout mixtral", "9.24M parameters, 4.12M active", "dp_shard=2 ep=2", "4/10", "6.0 s left",
                 "loss 5.000", "valid 4.000 (-4.30)", "MFU 41.0%", "grad norm 1.5", "L1 "):  # fmt: skip
        assert part in text
    # Routine notices do not push a failure out of sight.
    assert "crash of rank 1 on node-0" in text and "step 8  checkpoint" in text and "step 7" not in text


@pytest.mark.parametrize("width", [1, 10, 20, 39, 60, 200])
@pytest.mark.parametrize(("layers", "experts"), [(2, 4), (61, 256), (1, 1)])
def test_the_live_view_fits_any_terminal(width: int, layers: int, experts: int) -> None:
    lines = render(filled(layers, experts), width, 24)
    assert max(line.cell_len for line in lines) <= width
    assert width < 60 or len(lines) <= 24


def test_only_the_least_even_layers_where_not_all_fit() -> None:
    state = filled(layers=30, experts=64)
    state.loads[17] = [1.0] + [0.0] * 63
    text = "\n".join(line.plain for line in render(state, 90, 18))
    assert "least even of 30 layers" in text and "L17" in text


def test_heat_strip() -> None:
    assert heat_strip([0.25] * 4, 12, 3).plain == "▄▄ " * 4
    assert heat_strip([0.0, 0.125, 0.25, 0.625], 4, 1).plain == "x▂▄▇"
    assert heat_strip([0.0, 0.125, 0.25, 0.625], 4, 1, ascii_only=True).plain == "x.=%"
    # 128 experts in 16 cells: the one hot expert is not averaged away.
    hot = [1.0] * 128
    hot[77] = 30.0
    strip = heat_strip(hot, 16, 1).plain
    assert len(strip) == 16 and strip[77 // 8] == "█"
    assert heat_strip([float("nan"), 1.0], 2, 1).plain[0] == "x"


def test_heat_colors_go_from_blue_over_grey_to_orange() -> None:
    def red_minus_blue(ratio: float) -> int:
        color = heat_color(ratio)
        return int(color[1:3], 16) - int(color[5:7], 16)

    values = [red_minus_blue(ratio) for ratio in (0.25, 0.5, 1.0, 2.0, 4.0)]
    assert values == sorted(values) and abs(values[2]) < 30
    assert heat_color(100.0) == heat_color(4.0)


def test_the_terminal_is_given_back_after_an_exception() -> None:
    code = (
        "from trainer.metrics.terminal import TerminalView\n"
        "with TerminalView('auto', 10) as view:\n"
        "    view.metrics({'step': 3, 'tokens': 1, 'time': 0.0, 'loss/train': 4.25})\n"
        "    raise SystemExit(7)\n"
    )
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=child,
        stdout=child,
        stderr=child,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(child)
    output = b""
    while True:
        try:
            output += os.read(parent, 4096)
        except OSError:
            # Linux ends a pty with EIO.
            break
    os.close(parent)
    assert process.wait() == 7
    assert b"loss" in output and b"4.250" in output and b"3/10" in output
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l"), "the cursor stays hidden"


def test_final_summary(tmp_path: Path) -> None:
    run = tmp_path / "quick" / "a1"
    events = [
        start(0.0),
        failure(4.0, 3),
        start(6.0, 1),
        restart(6.0, 2, 1, 2.0, 1),
        resume(6.5, 2),
        finish(20.0, 10),
    ]
    write(run, events, [step(number, 1.0 + number + (5 if number > 2 else 0)) for number in range(1, 11)])
    (run / "report.html").write_text("x")
    (run / "wandb" / "offline-run-1-abc").mkdir(parents=True)
    text = io.StringIO()
    final_summary(Console(file=text, width=120), run)
    shown = re.sub(r" +", " ", text.getvalue())
    for part in (
        "quick/a1: finished", "steps 10 of 10", "tokens 5.12k", "tokens/s 512", "train loss 3.800",
        "3.500 nats a token: 4.80 below the untrained model (8.300), 2.50 below a unigram model (6.000)",
        "best 3.250 at step 10", "failures 1, 1 survived: 1 step redone, 2.0 s of restarts", "goodput 75.0%",
        "def f(x): return <x> & y", f"report {run}/report.html", f"wandb sync {run}/wandb/offline-run-1-abc",
    ):  # fmt: skip
        assert part in shown, part
