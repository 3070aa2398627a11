"""The report's section about recoveries: how long each took, where the time went, by kind of failure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.metrics.history import History
from trainer.metrics.html import section, wide
from trainer.metrics.plots import COLOR, RC, svg
from trainer.metrics.recovery import PARTS
from trainer.metrics.schema import Record, as_float
from trainer.metrics.text import seconds_text

_COLORS = {"detect": "#f472b6", "restart": COLOR["bad"], "load": "#14b8a6", "recompute": "#eab308"}
_SIZE = (13.0, 3.2)
_MAX_BARS = 500


def recovery_section(history: History) -> str:
    """Empty in a run that nothing happened to."""
    found = history.all("recovered")
    if not found:
        return ""
    seconds = _seconds(found)
    note = (
        "From the fault until the step that was reached before it was done again. "
        f"Median {seconds_text(float(np.median(seconds)))}, p99 {seconds_text(p99(seconds))}, "
        f"longest {seconds_text(max(seconds))}."
    )
    if len(found) > _MAX_BARS:
        note += f" The picture shows the last {_MAX_BARS} of {len(found)}."
    body = wide(_picture(found[-_MAX_BARS:])) + f'<div class="wide">{_table(found)}</div>'
    return section(f"Recovery: {len(found)}", body, note)


def p99(seconds: Sequence[float]) -> float:
    """The 99th percentile; of few values, the largest."""
    return float(np.quantile(seconds, 0.99, method="higher"))


def _seconds(found: Sequence[Record]) -> list[float]:
    return [as_float(event.get("seconds")) for event in found]


def _table(found: Sequence[Record]) -> str:
    names = sorted({str(event.get("kind")) for event in found})
    groups = [(name, [event for event in found if event.get("kind") == name]) for name in names]
    groups += [("all", list(found))] if len(groups) > 1 else []
    rows = []
    for name, events in groups:
        medians = [float(np.median([as_float(e.get(f"{part}_seconds")) for e in events])) for part in PARTS]
        values = [*medians, float(np.median(_seconds(events))), p99(_seconds(events))]
        cells = "".join(f'<td class="n">{seconds_text(value)}</td>' for value in values)
        rows.append(f'<tr><td>{escape(name)}</td><td class="n">{len(events)}</td>{cells}</tr>')
    keys = "".join(f'<th class="n"><span class="key {part}"></span>{part}</th>' for part in PARTS)
    totals = "".join(f'<th class="n">{name}</th>' for name in ("median", "p99"))
    head = f'<tr><th>failure</th><th class="n">recoveries</th>{keys}{totals}</tr>'
    return f"<table>{head}{''.join(rows)}</table>"


def _picture(found: Sequence[Record]) -> str:
    """One bar a recovery, oldest first, its parts on top of each other."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        at = np.arange(1, len(found) + 1)
        bottom = np.zeros(len(found))
        for part in PARTS:
            height = np.array([as_float(event.get(f"{part}_seconds")) for event in found])
            axes.bar(at, height, bottom=bottom, color=_COLORS[part], width=0.8, linewidth=0, label=part)
            bottom += height
        axes.set_xlabel("recovery")
        axes.set_ylabel("s")
        axes.grid(visible=False, axis="x")
        axes.set_xlim(0.4, max(len(found), 8) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.tick_params(length=3)
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": len(PARTS)}
        axes.legend(frameon=False, fontsize=9.5, borderaxespad=0.2, labelcolor=COLOR["ink"], **place)
        return svg(figure, "plot")
