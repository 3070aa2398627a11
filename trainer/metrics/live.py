"""What the live terminal view shows: its state, and that state as lines of text for any width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.text import Text

from trainer.metrics.schema import Record, as_float, load_layer
from trainer.metrics.text import count_text, event_text, percent_text, seconds_text

_NOTICES = 5
_NARROW = 50
_ROUTINE = ("checkpoint", "evaluation")
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_EVEN_BAR = 3
_COLD, _NEUTRAL, _HOT = (59, 130, 246), (130, 138, 150), (239, 88, 32)
_MARKS = {
    "checkpoint": ("✓", "green"),
    "evaluation": ("✓", "green"),
    "failure": ("✗", "bold red"),
    "restart": ("↻", "yellow"),
    "resume": ("↻", "yellow"),
    "alarm": ("!", "bold yellow"),
    "cure": ("+", "cyan"),
    "stop": ("■", "yellow"),
    "finish": ("✓", "bold green"),
}
_ASCII_MARKS = {"✓": "+", "✗": "x", "↻": "~", "■": "#"}


@dataclass
class State:
    """The newest of everything. Written by the training thread, read by the drawing one."""

    total_steps: int
    name: str = ""
    start: Record = field(default_factory=dict)
    latest: Record = field(default_factory=dict)
    valid: float | None = None
    first_valid: float | None = None
    loads: dict[int, list[float]] = field(default_factory=dict)
    notices: list[Record] = field(default_factory=list)
    alarms: dict[str, Record] = field(default_factory=dict)
    """Kinds of trouble with the routing that are not over, each with what was said of it last."""
    began: float | None = None
    seen: float | None = None
    eta: float | None = None
    idle: float = 0.0
    """Seconds since the last record or event, for a run that hangs."""

    def record(self, record: Record, eta: float | None) -> None:
        """Take in a metrics record."""
        self.latest = {**self.latest, **record}
        self.eta, self.seen = eta, record["time"]
        if "loss/valid" in record:
            self._validated(as_float(record["loss/valid"]))
        loads = {layer: value for name, value in record.items() if (layer := load_layer(name)) is not None}
        if loads:
            self.loads = {layer: [as_float(share) for share in loads[layer]] for layer in sorted(loads)}

    def event(self, event: Record) -> None:
        """Take in an event."""
        self.seen = event["time"]
        if event["event"] == "start":
            self.start = event
            self.began = self.began if self.began is not None else event["time"]
            self.name = self.name or "/".join(str(event.get("run_dir", "")).rstrip("/").split("/")[-2:])
            return
        if event["event"] == "evaluation":
            self._validated(as_float(event["loss_valid"]))
        elif event["event"] == "resume":
            self.latest = {**self.latest, "step": event["step"]}
            # What was said of later steps will be said again, if it is so again.
            self.alarms = {kind: e for kind, e in self.alarms.items() if e["step"] <= event["step"]}
        elif event["event"] == "alarm" and "state" in event:
            self._alarm(event)
            if event["state"] == "raised":  # it stays in sight by itself until it is over
                return
        # Of what happens all the time only the newest stays, so that a failure stays in sight. A new list,
        # since the drawing thread may be reading the old one.
        kept = [e for e in self.notices if e["event"] != event["event"] or e["event"] not in _ROUTINE]
        self.notices = [*kept, event][-_NOTICES:]

    def _alarm(self, event: Record) -> None:
        alarms = {**self.alarms}
        if event["state"] == "raised":
            alarms[event["kind"]] = event
        elif not event.get("layers"):
            alarms.pop(event["kind"], None)
        self.alarms = alarms

    def _validated(self, loss: float) -> None:
        self.valid = loss
        self.first_valid = loss if self.first_valid is None else self.first_valid

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrow = options.max_width < _NARROW
        width = options.max_width - (0 if narrow else 4)
        height = (options.height or console.height) - (0 if narrow else 2)
        lines = render(self, width, height, ascii_only=options.ascii_only)
        if narrow:
            yield from lines
        else:
            title = Text.assemble(
                ("muster", "bold"), f"  {self.name}" if self.name else "", overflow="ellipsis"
            )
            yield Panel(
                Text("\n").join(lines), title=title, title_align="left", border_style="dim", padding=(0, 1)
            )


def render(state: State, width: int, height: int, ascii_only: bool = False) -> list[Text]:
    """The view as lines of at most ``width`` cells; expert load takes what is left of ``height``."""
    head = _header(state, width)
    progress = [_progress(state, width, ascii_only)]
    numbers = _flow(_numbers(state), width)
    notices = [line for event in state.alarms.values() for line in _alarm(event)]
    notices += [_notice(event, ascii_only) for event in state.notices]
    if state.idle > 20 and state.latest.get("step", 0) < state.total_steps:
        notices.append(Text(f"no news for {seconds_text(state.idle)}", style="yellow"))
    room = height - len(head) - len(progress) - len(numbers) - len(notices) - 4
    heat = _heat(state.loads, width, max(1, room), ascii_only) if state.loads else []
    lines: list[Text] = []
    for block in (head, progress, numbers, heat, notices):
        if block:
            lines += [Text("")] * bool(lines) + block
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines


def _header(state: State, width: int) -> list[Text]:
    start = state.start
    if not start:
        return [Text("starting …", style="dim")]
    total, active = as_float(start.get("num_parameters")), as_float(start.get("num_active_parameters"))
    size = f"{count_text(total)} parameters"
    if active < total:
        size += f", {count_text(active)} active"
    facts = [
        *(f"{key} {value}" for key, value in (start.get("config") or {}).items()),
        size,
        str(start.get("parallel")),
        str(start.get("device")),
    ]
    return _flow([Text(fact, style="cyan") for fact in facts], width)


def _progress(state: State, width: int, ascii_only: bool) -> Text:
    step, total = int(state.latest.get("step", 0)), max(1, state.total_steps)
    share = min(1.0, step / total)
    tail = f" {step}/{state.total_steps}  {100 * share:3.0f}%"
    if state.began is not None and state.seen is not None and width >= _NARROW:
        tail += f"  {seconds_text(state.seen - state.began)}"
    if step >= total:
        tail += "  done"
    elif state.eta is not None:
        tail += f"  {seconds_text(state.eta)} left"
    room = max(4, width - len(tail))
    full = round(share * room)
    bar, rest = ("#", "-") if ascii_only else ("━", "━")
    return Text.assemble((bar * full, "bold green"), (rest * (room - full), "bright_black"), tail)


def _numbers(state: State) -> list[Text]:
    latest, fields = state.latest, []

    def add(label: str, value: str, note: str = "") -> None:
        fields.append(Text.assemble((f"{label} ", "dim"), (value, "bold"), (note, "dim")))

    if "loss/train" in latest:
        loss = as_float(latest["loss/train"])
        add("loss", f"{loss:.3f}")
    if state.valid is not None:
        drop = state.valid - (state.first_valid or 0.0)
        add("valid", f"{state.valid:.3f}", f" ({drop:+.2f})" if drop else "")
    if "perf/tokens_per_second" in latest:
        rate = as_float(latest["perf/tokens_per_second"])
        add("tokens/s", count_text(rate))
    if "perf/mfu" in latest:
        add("MFU", percent_text(as_float(latest["perf/mfu"])))
    if "grad_norm" in latest:
        add("grad norm", f"{as_float(latest['grad_norm']):.3g}")
    if "optim/lr" in latest:
        add("lr", f"{as_float(latest['optim/lr']):.2e}")
    if latest.get("moe/drop_rate"):
        add("dropped", percent_text(as_float(latest["moe/drop_rate"])))
    if "ft/goodput" in latest:
        add("goodput", percent_text(as_float(latest["ft/goodput"])))
    return fields


def _flow(fields: Iterable[Text], width: int, gap: str = "   ") -> list[Text]:
    """Put fields side by side, a new line where the next does not fit."""
    lines: list[Text] = []
    for item in fields:
        if lines and lines[-1].cell_len + len(gap) + item.cell_len <= width:
            lines[-1].append(gap).append_text(item)
        else:
            lines.append(item.copy())
    return lines


def _notice(event: Record, ascii_only: bool) -> Text:
    mark, style = _MARKS.get(event["event"], ("·", ""))
    if event.get("state") == "cleared":
        mark, style = "✓", "green"
    if ascii_only:
        mark = _ASCII_MARKS.get(mark, mark)
    return Text.assemble(
        (f"{mark} ", style), (f"step {event['step']}  {event['event']}  ", style), event_text(event)
    )


def _alarm(event: Record) -> list[Text]:
    since = f"since step {event['since']}" if "since" in event else f"step {event['step']}"
    kind = str(event["kind"]).replace("_", " ")
    text = Text.assemble(("! ", "bold yellow"), (f"{kind}  {since}  ", "bold yellow"), str(event["message"]))
    remedy = event.get("remedy")
    return [text, Text(f"  {remedy}", style="dim")] if remedy else [text]


def _heat(loads: dict[int, list[float]], width: int, rows: int, ascii_only: bool) -> list[Text]:
    """Title and strips, one a MoE layer, in columns where they fit; the least even layers if not all do."""
    rows = max(1, rows - 1)
    num_experts = max(len(load) for load in loads.values())
    label = max(len(f"L{layer}") for layer in loads) + 1
    note = len(" 10.0x")
    room = max(1, width - label - note)
    cell = 3 if 3 * num_experts <= room else 2 if 2 * num_experts <= room else 1
    strip = min(room, cell * num_experts)
    columns = max(1, (width + 3) // (label + strip + note + 3))
    shown = list(loads)
    if len(shown) > rows * columns:
        worst = sorted(loads, key=lambda layer: _worst(loads[layer]), reverse=True)
        shown = sorted(worst[: rows * columns])
    left_out = f", the {len(shown)} least even of {len(loads)} layers" if len(shown) < len(loads) else ""
    even = (_ASCII_BARS if ascii_only else _BARS)[_EVEN_BAR]
    title = Text.assemble(
        ("expert load", "bold"), (f"  {even} even, at right the busiest / mean{left_out}", "dim")
    )
    per_column = -(-len(shown) // columns)
    lines = []
    for row in range(per_column):
        line = Text()
        for layer in shown[row::per_column]:
            line.append("   " if line.cell_len else "")
            line.append(f"L{layer}".ljust(label), style="dim")
            line.append_text(heat_strip(loads[layer], strip, cell, ascii_only))
            line.append(f" {_worst(loads[layer]):.1f}x".ljust(note), style="dim")
        lines.append(line)
    return [title, *lines]


def heat_strip(load: Sequence[float], width: int, cell: int, ascii_only: bool = False) -> Text:
    """One strip: height and colour of a cell tell an expert's load / mean, grey half height is even.

    Where there are more experts than cells, a cell shows the one that is furthest from even, since a mean
    would hide the hot and the dead ones. A dead expert is a red ``x``.
    """
    ratios = _ratios(load)
    num_cells = max(1, min(len(ratios), width // cell))
    bars = _ASCII_BARS if ascii_only else _BARS
    text = Text()
    for index in range(num_cells):
        group = ratios[index * len(ratios) // num_cells : (index + 1) * len(ratios) // num_cells]
        ratio = max(group, key=lambda value: abs(_log2(value)))
        if ratio <= 0:
            mark, style = "x", "bold red"
        else:
            level = min(max(round(_EVEN_BAR + 2 * _log2(ratio)), 0), len(bars) - 1)
            mark, style = bars[level], heat_color(ratio)
        text.append(mark * max(1, cell - 1), style=style).append(" " * (cell > 1))
    return text


def heat_color(ratio: float) -> str:
    """``#rrggbb`` for a load / mean: blue at a quarter and below, grey at 1, orange at four and above."""
    # The root shows small unevenness, too.
    share = min(1.0, (abs(_log2(ratio)) / 2) ** 0.7)
    end = _HOT if ratio > 1 else _COLD
    mix = [round(n + (e - n) * share) for n, e in zip(_NEUTRAL, end, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mix)


def _ratios(load: Sequence[float]) -> list[float]:
    total = sum(share for share in load if math.isfinite(share))
    return [share * len(load) / total if math.isfinite(share) and total > 0 else 0.0 for share in load]


def _worst(load: Sequence[float]) -> float:
    return max(_ratios(load), default=0.0)


def _log2(ratio: float) -> float:
    """log2, kept within ±2; a dead expert (0) counts just beyond the rest."""
    return min(max(math.log2(ratio), -2.0), 2.0) if ratio > 0 else -2.01
