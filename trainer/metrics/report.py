"""``report.html``: one run on one page that needs nothing else, from the files of its run directory."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

import numpy as np

from trainer.metrics.goodput import CAUSES
from trainer.metrics.health_report import MAX_LAYERS, health_sections, sampled
from trainer.metrics.history import History
from trainer.metrics.html import section, wide
from trainer.metrics.map_plots import heat_maps
from trainer.metrics.plots import Line, Marks, line_plot
from trainer.metrics.recovery_report import recovery_section
from trainer.metrics.schema import Record, as_float, find, interrupts
from trainer.metrics.summary import best_text, failures_text
from trainer.metrics.text import count_text, event_text, percent_text, seconds_text

_WIDE, _HALF = (13.0, 4.2), (6.3, 2.4)
_MAX_EVENTS = 200

# (metric, title) of the half-width plots, in the order of the page.
_MOE_PLOTS = (
    ("moe/max_over_mean", "Busiest expert / mean load"),
    ("moe/rank_max_over_mean", "Busiest ep rank / mean load"),
    ("moe/router_entropy", "Router entropy"),
    ("moe/router_confidence", "Router confidence"),
    ("moe/drop_rate", "Dropped pairs"),
    ("moe/unserved_rate", "Tokens without an expert"),
    ("moe/dead_experts", "Experts without a token"),
    ("loss/balance", "Balance loss"),
    ("loss/router_z", "Router z-loss"),
    ("moe/a2a_bytes", "All-to-all traffic"),
    ("moe/wait_seconds", "Waiting for other ranks"),
)
# Said instead of drawn while these are zero throughout.
_NEVER = {
    "moe/drop_rate": "No routed pair was ever dropped.",
    "moe/unserved_rate": "Every token was answered by an expert.",
    "moe/dead_experts": "No expert was ever without a token.",
}
_SPEED_PLOTS = (
    ("perf/tokens_per_second", "Throughput"),
    ("perf/mfu", "Model FLOPs utilisation"),
    ("ft/goodput", "Goodput so far"),
)
_OPTIM_PLOTS = (("grad_norm", "Gradient norm before clipping"), ("optim/lr", "Learning rate"))


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory, of a finished or a running run, and return its path.

    Raises:
        ConfigError: the directory holds no run.
    """
    history = History.load(run_dir)
    path = run_dir / "report.html"
    aside = path.with_name(".report.html.tmp")
    aside.write_text(render(history), encoding="utf-8")
    return aside.replace(path)


def render(history: History) -> str:
    """The page as one HTML text; all that comes from the run is escaped."""
    parts = [_header(history), _tiles(history), _loss(history)]
    parts += [_experts(history)] if history.layers() else []
    parts += health_sections(history)
    failures = _failures(history)
    parts.append(_plots(history, "Speed", _SPEED_PLOTS, failures))
    parts.append(_plots(history, "Optimizer", _OPTIM_PLOTS, failures))
    parts += [
        _goodput(history),
        recovery_section(history),
        _sample(history),
        _events(history),
        _config(history),
    ]
    css = resources.files("trainer.metrics").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(history.name)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<footer>Muster · {escape(str(history.run_dir))}</footer>\n</main>\n</body>\n</html>\n"
    )


def _header(history: History) -> str:
    start, state = history.start, history.state
    facts: dict[str, object] = dict(start.get("config") or {})
    for label, key in (("parallel", "parallel"), ("device", "device"), ("ranks", "world_size")):
        facts[label] = start.get(key)
    for label, key in (("parameters", "num_parameters"), ("active", "num_active_parameters")):
        facts[label] = count_text(float(start[key])) if isinstance(start.get(key), (int, float)) else None
    facts["tokens a step"] = start.get("tokens_per_step")
    items = [
        f"<li><b>{escape(str(label))}</b>{escape(str(value))}</li>"
        for label, value in facts.items()
        if value is not None
    ]
    badge = f'<span class="badge {state}">{state}</span>'
    return f'<header><h1>{escape(history.name)}{badge}</h1><ul class="facts">{"".join(items)}</ul></header>'


def _tiles(history: History) -> str:
    losses, account = history.losses(), history.account
    last = history.records[-1] if history.records else {}
    tiles: list[tuple[str, str, str]] = []
    if "valid" in losses:
        gaps = [
            f"{losses['valid'] - losses[name]:+.2f} to {name}"
            for name in ("untrained", "unigram")
            if name in losses
        ]
        tiles.append(("validation loss", f"{losses['valid']:.3f}", "nats a token<br>" + ", ".join(gaps)))
    if "train" in losses:
        best = best_text(history, losses)
        tiles.append(
            ("training loss", f"{losses['train']:.3f}", f"best validation {best}" if best else "nats a token")
        )
    if last:
        steps = history.start.get("steps")
        done = f"{last['step']:,}" + (f" of {steps:,} steps" if isinstance(steps, int) else " steps")
        tiles.append(("tokens", count_text(last["tokens"]), done))
    rate, mfu = history.mean_rate(), _median(history, "perf/mfu")
    if rate is not None:
        tiles.append(("tokens/s", count_text(rate), f"MFU {percent_text(mfu)}" if mfu is not None else ""))
    if account.wall > 0:
        tiles.append(("goodput", percent_text(account.goodput), f"of {seconds_text(account.wall)}"))
    tiles.append(("failures", str(len(history.all("failure"))), failures_text(history).partition(", ")[2]))
    cells = [
        f'<div class="tile"><div class="label">{label}</div><div class="value">{escape(value)}</div>'
        f'<div class="note">{note}</div></div>'
        for label, value, note in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _loss(history: History) -> str:
    train, valid, losses = history.series("loss/train"), history.valid(), history.losses()
    lines = []
    if len(train[0]):
        lines.append(Line(*train, label="train", smooth=True))
    if len(valid[0]):
        lines.append(Line(*valid, label="valid", color="c2", dots=True))
    if not lines:
        return section("Loss", '<p class="note">No step was logged yet.</p>')
    levels = [(losses[name], name) for name in ("untrained", "unigram") if name in losses]
    svg = line_plot(lines, unit="nats a token", size=_WIDE, marks=Marks(_failures(history), levels))
    note = "Cross-entropy. Dashed: the untrained model and a unigram model of the same data."
    if _failures(history):
        note += " Red lines: failures, each followed by a restart from the newest valid checkpoint."
    bad = int((~np.isfinite(train[1])).sum())
    if bad:
        note += f" Red crosses: {bad} step{'s' if bad > 1 else ''} with a loss that is not finite."
    return section("Loss", wide(svg), note)


def _experts(history: History) -> str:
    layers = [(layer, *history.load_ratio(layer)) for layer in history.layers()]
    layers = [(layer, steps, ratio) for layer, steps, ratio in layers if ratio.size]
    if not layers:
        return ""
    note = "Share of the routed pairs that each expert was chosen for, as a multiple of an even share."
    layers, more = sampled(layers, MAX_LAYERS)
    failures = _failures(history)
    heat = wide(heat_maps(layers, failures=failures))
    return section("Expert load", heat, note + more) + "\n" + _plots(history, "Routing", _MOE_PLOTS, failures)


def _plots(
    history: History, title: str, plots: Sequence[tuple[str, str]], failures: Sequence[tuple[float, str]]
) -> str:
    """A section of half-width plots of those metrics that were logged; empty without any."""
    figures, never = [], []
    for name, caption in plots:
        steps, values = history.series(name)
        if not len(steps):
            continue
        if name in _NEVER and not (values != 0).any():
            never.append(_NEVER[name])
            continue
        metric = find(name)
        assert metric is not None, name
        percent = metric.unit == "fraction"
        noisy = name in ("grad_norm", "perf/tokens_per_second", "perf/mfu")
        svg = line_plot(
            [Line(steps, values, smooth=noisy)],
            unit="" if percent else metric.unit,
            size=_HALF,
            marks=Marks([(step, "") for step, _ in failures]),
            percent=percent,
        )
        figures.append(f"<figure><h3>{caption}</h3>{svg}</figure>")
    return section(title, f'<div class="grid">{"".join(figures)}</div>', " ".join(never)) if figures else ""


def _goodput(history: History) -> str:
    account = history.account
    if account.wall <= 0:
        return ""
    spent = [(cause, getattr(account, cause)) for cause in CAUSES if getattr(account, cause) > 0]
    bar = "".join(
        f'<i class="{cause}" style="flex:{seconds:.4f}" title="{cause}"></i>' for cause, seconds in spent
    )
    rows = [
        f'<tr><td><span class="key {cause}"></span>{cause}</td><td class="n">{seconds_text(seconds)}</td>'
        f'<td class="n">{percent_text(seconds / account.wall)}</td></tr>'
        for cause, seconds in spent
    ]
    if account.stopped > 0:
        rows.append(
            f'<tr><td><span class="key stopped-time"></span>stopped (not counted)</td>'
            f'<td class="n">{seconds_text(account.stopped)}</td><td class="n"></td></tr>'
        )
    note = f"Where {seconds_text(account.wall)} went: useful are the steps of the final model, counted once."
    table = f'<table class="account">{"".join(rows)}</table>'
    return section(f"Goodput {percent_text(account.goodput)}", f'<div class="bar">{bar}</div>{table}', note)


def _sample(history: History) -> str:
    sample = history.finish.get("sample")
    if not sample:
        return ""
    text = f"<b>{escape(str(sample.get('prompt', '')))}</b>{escape(str(sample.get('text', '')))}"
    return section("Sample", f"<pre>{text}</pre>", "Written by the trained model after the prompt in colour.")


def _events(history: History) -> str:
    events = [event for event in history.events if "event" in event]
    if not events:
        return ""
    shown = events
    if len(events) > _MAX_EVENTS:
        # Routine ones give way first, the oldest of them before the others.
        routine = ("checkpoint", "evaluation")
        rare = [event for event in events if event["event"] not in routine][-_MAX_EVENTS:]
        room = _MAX_EVENTS - len(rare)
        often = [event for event in events if event["event"] in routine][-room:] if room else []
        shown = sorted([*rare, *often], key=lambda event: event["time"])
    began = events[0]["time"]
    rows = [
        f'<tr class="{_row_class(event)}"><td class="n">+{seconds_text(event["time"] - began)}</td>'
        f'<td class="n">{escape(str(event.get("step", "")))}</td><td>{escape(str(event["event"]))}</td>'
        f'<td class="said">{escape(event_text(event))}</td></tr>'
        for event in shown
    ]
    head = '<tr><th class="n">time</th><th class="n">step</th><th>event</th><th></th></tr>'
    note = f"{len(events)} events" + (f", {len(shown)} shown" if len(shown) < len(events) else "")
    return section("Events", f'<div class="wide"><table>{head}{"".join(rows)}</table></div>', note)


def _row_class(event: Record) -> str:
    name = "plain" if event.get("state") == "cleared" else event["event"]
    return "restart-row" if name == "restart" else name if name in ("failure", "alarm", "finish") else "plain"


def _config(history: History) -> str:
    path = history.run_dir / "config.yaml"
    if not path.is_file():
        return ""
    text = escape(path.read_text(encoding="utf-8", errors="replace"))
    return f"<section><details><summary>config.yaml</summary><pre>{text}</pre></details></section>"


def _failures(history: History) -> list[tuple[float, str]]:
    failures = [event for event in history.all("failure") if interrupts(event)]
    return [(as_float(event.get("step")), str(event.get("kind", ""))) for event in failures]


def _median(history: History, name: str) -> float | None:
    values = history.series(name)[1]
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None
