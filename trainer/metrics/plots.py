"""The report's plots as inline SVG, without pyplot.

Colours are written as CSS variables (``var(--ink)`` …), so that one picture serves light and dark pages, and
text stays text. Lines are reduced to at most 2,000 points.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from trainer.metrics.text import count_text

Array = NDArray[np.float64]

MAX_POINTS = 2000
_SMOOTH_FROM = 60
LEVELS = 33
"""Few distinct colours make small pictures."""

# Colours that nothing else uses, each replaced by its CSS variable in the finished picture.
_VARIABLES = {
    "#010101": "--ink",
    "#020202": "--muted",
    "#030303": "--grid",
    "#040404": "--c1",
    "#050505": "--c2",
    "#060606": "--bad",
    "#070707": "--good",
}
COLOR = {name[2:]: color for color, name in _VARIABLES.items()}
_COLD, _HOT = (37, 99, 235), (234, 88, 12)
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "muster",
    "font.size": 10,
    "text.color": COLOR["ink"],
    "axes.labelcolor": COLOR["muted"],
    "axes.edgecolor": COLOR["grid"],
    "xtick.color": COLOR["grid"],
    "ytick.color": COLOR["grid"],
    "xtick.labelcolor": COLOR["muted"],
    "ytick.labelcolor": COLOR["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": COLOR["grid"],
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "path.simplify_threshold": 0.25,
}


@dataclass(frozen=True)
class Line:
    """One curve: values [n] over steps [n]; NaN and infinities are gaps with a mark on the axis."""

    steps: Array
    values: Array
    label: str = ""
    color: str = "c1"
    dots: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class Marks:
    """What is drawn behind every curve: failures as (step, kind), levels as (value, label)."""

    failures: Sequence[tuple[float, str]] = field(default_factory=tuple)
    levels: Sequence[tuple[float, str]] = field(default_factory=tuple)


def downsample(steps: Array, values: Array, points: int = MAX_POINTS) -> tuple[Array, Array, Array, Array]:
    """Means of equal runs of points, with their extremes: (steps, mean, low, high), each at most [points].

    Non-finite values are left out of a mean; a run of nothing else is NaN.
    """
    width = max(1, -(-len(steps) // points))
    pad = -len(steps) % width
    rows = np.pad(np.where(np.isfinite(values), values, np.nan), (0, pad), constant_values=np.nan)
    rows = rows.reshape(-1, width)
    count = np.isfinite(rows).sum(axis=1)
    mean = np.divide(np.nansum(rows, axis=1), count, out=np.full(len(rows), np.nan), where=count > 0)
    low = np.where(count > 0, np.min(np.nan_to_num(rows, nan=np.inf), axis=1, initial=np.inf), np.nan)
    high = np.where(count > 0, np.max(np.nan_to_num(rows, nan=-np.inf), axis=1, initial=-np.inf), np.nan)
    return (
        steps[width - 1 :: width] if not pad else np.append(steps[width - 1 :: width], steps[-1]),
        mean,
        low,
        high,
    )


def line_plot(
    lines: Sequence[Line],
    *,
    unit: str,
    size: tuple[float, float],
    marks: Marks = Marks(),
    percent: bool = False,
) -> str:
    """Curves over steps as SVG. ``size`` in inches of 72 CSS pixels; ``unit`` labels the y axis."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=size)
        axes = figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        _draw_marks(axes, marks)
        _style(axes, unit, percent)
        _room_for_flat(axes, lines)
        legend = any(line.label for line in lines)
        _set_margins(figure, legend)
        if legend:
            above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": len(lines)}
            axes.legend(frameon=False, fontsize=9.5, borderaxespad=0.2, labelcolor=COLOR["ink"], **above)
        return svg(figure, "plot")


def _draw(axes: Axes, line: Line) -> None:
    color = COLOR[line.color]
    steps, mean, low, high = downsample(line.steps, line.values)
    lost = (
        steps[~np.isfinite(line.values)]
        if len(steps) == len(line.values)
        else line.steps[~np.isfinite(line.values)]
    )
    if len(lost):
        lost = lost[:: max(1, len(lost) // 100)]
        axes.plot(
            lost, np.zeros(len(lost)), "x", color=COLOR["bad"], transform=axes.get_xaxis_transform(),
            clip_on=False, markersize=5, zorder=5,
        )  # fmt: skip
    if line.dots or np.isfinite(mean).sum() == 1:
        axes.plot(steps, mean, "-o", color=color, linewidth=1.4, markersize=4, label=line.label, zorder=4)
    elif line.smooth and len(steps) >= _SMOOTH_FROM:
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        axes.plot(steps, mean, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(steps, _smooth(mean), color=color, linewidth=1.8, label=line.label)
    else:
        axes.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
        axes.plot(steps, mean, color=color, linewidth=1.5, label=line.label)


def _smooth(values: Array) -> Array:
    """Mean over 1/40 of the curve, NaNs left out; narrower at the start, where a loss falls steeply."""
    half = max(1, len(values) // 80)
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(values))
    reach = np.minimum(half, index)
    since, until = index - reach, np.minimum(index + reach + 1, len(values))
    number = count[until] - count[since]
    return np.where(number > 0, (total[until] - total[since]) / np.maximum(number, 1), np.nan)


def _draw_marks(axes: Axes, marks: Marks) -> None:
    for value, label in marks.levels:
        axes.axhline(value, color=COLOR["muted"], linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{label} {value:.2f}", (0.995, value), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", ha="right", fontsize=8.5, color=COLOR["muted"],
        )  # fmt: skip
    for index, (step, kind) in enumerate(marks.failures):
        axes.axvline(step, color=COLOR["bad"], linewidth=1.0, alpha=0.7, zorder=1)
        # Many failures would write over each other.
        if index < 6:
            axes.annotate(
                kind, (step, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0),
                textcoords="offset points", fontsize=8, color=COLOR["bad"], rotation=90, va="bottom",
            )  # fmt: skip


def _style(axes: Axes, unit: str, percent: bool) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.margins(x=0.01, y=0.08)
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    elif axes.get_ylim()[1] >= 1000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    axes.tick_params(length=3)


def _set_margins(figure: Figure, legend: bool) -> None:
    """The same for all curves, so that they align; to fit each to its labels takes longer than to draw it."""
    width, height = figure.get_size_inches()
    above = 0.32 if legend else 0.1
    figure.subplots_adjust(
        left=0.72 / width, right=1.0 - 0.12 / width, bottom=0.46 / height, top=1.0 - above / height
    )


def _room_for_flat(axes: Axes, lines: Sequence[Line]) -> None:
    """Constants and single points have no range of their own: show them from zero, and whole steps."""
    known = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    if len(known) and np.ptp(known) <= 1e-9 * abs(known[0]) and known[0] >= 0:
        axes.set_ylim(0.0, 1.25 * known[0] or 1.0)
    steps = np.concatenate([line.steps for line in lines])
    if np.ptp(steps) == 0:
        axes.set_xlim(steps[0] - 1.5, steps[0] + 1.5)


def diverging() -> ListedColormap:
    """Blue below, orange above, transparent where load is even: neutral on a light and on a dark page."""
    share = np.linspace(-1.0, 1.0, LEVELS)
    colors = np.array([(*(np.array(_HOT if s > 0 else _COLD) / 255.0), abs(s) ** 0.7) for s in share])
    return ListedColormap(colors)


def svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element with CSS variables for colours and no ids but those it refers to."""
    buffer = io.StringIO()
    figure.patch.set_alpha(0.0)
    for axes in figure.axes:
        axes.patch.set_alpha(0.0)
    FigureCanvasSVG(figure).print_svg(
        buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for color, name in _VARIABLES.items():
        text = text.replace(color, f"var({name})")
    # Several pictures share a page: names given by position would clash, and nothing refers to them.
    text = re.sub(r' id="[a-zA-Z]+[a-zA-Z0-9]*_\d+"', "", text)
    text = re.sub(r' d="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    return re.sub(r"\n\s*", "\n", text).replace("<svg", f'<svg class="{title}" role="img"', 1)
