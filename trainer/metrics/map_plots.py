"""The report's heat maps: loads over time, and one matrix a layer. Every colour is a ratio to what is even.

Blue is less, orange more, the page's own colour even; four times and a quarter are the ends of the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from trainer.metrics.plots import COLOR, LEVELS, RC, Array, diverging, svg
from trainer.metrics.text import count_text

_COLUMNS = 240
_PIXELS = 1_500_000
_WIDTH = 13.0
_NOTHING = (0.5, 0.5, 0.5, 0.28)
"""Where there is nothing to say: grey on a light and on a dark page."""
_MAP_RC: dict[Any, Any] = {**RC, "axes.grid": False, "image.composite_image": False}


@dataclass(frozen=True)
class Matrix:
    """One layer's map.

    Attributes:
        title: above it.
        ratio: [rows, columns] to what is even; NaN where there is nothing to say.
    """

    title: str
    ratio: Array


def heat_maps(
    layers: Sequence[tuple[int, Array, Array]],
    *,
    failures: Sequence[tuple[float, str]] = (),
    ylabel: str = "expert",
) -> str:
    """Load over time as small multiples, one map a MoE layer: steps along x, experts (or ranks) along y.

    Args:
        layers: (layer, steps [n], load / mean load [n, rows]).
        failures: (step, kind), drawn as lines.
    """
    columns = _num_columns(len(layers))
    rows = -(-len(layers) // columns)
    most = max(ratio.shape[1] for _, _, ratio in layers)
    bins = int(np.clip(_PIXELS // (most * len(layers)), 24, _COLUMNS))
    height = min(2.2, max(1.3, 0.35 + 0.11 * most)) if rows <= 2 else 1.35
    with matplotlib.rc_context(_MAP_RC):
        figure = Figure(figsize=(_WIDTH, 0.75 + height * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        image = None
        for index, axes in enumerate(grid.flat):
            if index >= len(layers):
                axes.set_axis_off()
                continue
            layer, steps, ratio = layers[index]
            image = _over_time(axes, steps, ratio, bins)
            _title(axes, f"layer {layer}")
            axes.set_xlabel("step" if index + columns >= len(layers) else "")
            axes.set_ylabel(ylabel if index % columns == 0 else "")
            for step, _ in failures:
                axes.axvline(step, color=COLOR["bad"], linewidth=0.9, alpha=0.8)
        assert image is not None, "heat_maps of no layer"
        _bar(figure, image, grid, rows, "1 even", "load / mean")
        return svg(figure, "heat")


def matrix_maps(
    maps: Sequence[Matrix], *, xlabel: str, ylabel: str, row_names: Sequence[str] = (), even: str, label: str
) -> str:
    """One matrix a layer as small multiples.

    Args:
        row_names: of the rows; without them both axes count, and cells are square.
        even: what a ratio of 1 is called on the scale.
        label: of the scale.
    """
    square = not row_names
    columns = min(len(maps), 4) if square else _num_columns(len(maps))
    rows = -(-len(maps) // columns)
    height = 2.8 if square else min(3.6, 0.75 + 0.21 * len(row_names))
    # A page scales a picture to its width: one or two squares stay as large as four, with room beside them.
    with matplotlib.rc_context(_MAP_RC):
        figure = Figure(
            figsize=(_WIDTH, 0.5 + height * rows), layout="compressed" if square else "constrained"
        )
        grid = figure.subplots(rows, columns, squeeze=False)
        image = None
        for index, axes in enumerate(grid.flat):
            if index >= len(maps):
                axes.set_axis_off()
                continue
            image = _matrix(axes, maps[index].ratio, "equal" if square else "auto")
            _title(axes, maps[index].title)
            axes.set_xlabel(xlabel if index + columns >= len(maps) else "")
            if square:
                axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
                axes.set_ylabel(ylabel if index % columns == 0 else "")
            else:
                names = row_names if index % columns == 0 else [""] * len(row_names)
                axes.yaxis.set_major_locator(FixedLocator(list(range(len(row_names)))))
                axes.set_yticklabels(names, fontsize=9)
        assert image is not None, "matrix_maps of no layer"
        _bar(figure, image, grid, rows, even, label)
        return svg(figure, "heat")


def _num_columns(num: int) -> int:
    return min(num, 2 if num <= 4 else 3 if num <= 12 else 4)


def _over_time(axes: Axes, steps: Array, ratio: Array, bins: int) -> AxesImage:
    """One layer; columns are means over equal runs of logged steps, a missing one stays empty."""
    groups = np.array_split(np.arange(len(steps)), min(bins, len(steps)))
    finite = np.where(np.isfinite(ratio), ratio, 0.0)
    means = np.stack([finite[group].mean(axis=0) for group in groups], axis=1)
    left = steps[0] - (1 if len(steps) == 1 else 0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.tick_params(length=3)
    return axes.imshow(
        _level(means), aspect="auto", origin="lower", interpolation="none", cmap=diverging(), vmin=-2, vmax=2,
        extent=(float(left), float(steps[-1]), -0.5, ratio.shape[1] - 0.5),
    )  # fmt: skip


def _matrix(axes: Axes, ratio: Array, aspect: Any) -> AxesImage:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.tick_params(length=3)
    known = np.ma.masked_invalid(_level(ratio))
    colors = diverging().with_extremes(bad=_NOTHING)
    return axes.imshow(
        known, aspect=aspect, origin="upper", interpolation="none", cmap=colors, vmin=-2, vmax=2
    )


def _level(ratio: Array) -> Array:
    """log2 within ±2, in few distinct values; NaN stays."""
    level = np.clip(np.log2(np.maximum(ratio, 2.0**-2)), -2.0, 2.0)
    return np.round((level + 2.0) / 4.0 * (LEVELS - 1)) / (LEVELS - 1) * 4.0 - 2.0


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=9.5, loc="left", color=COLOR["ink"])


def _bar(figure: Figure, image: AxesImage, grid: Any, rows: int, even: str, label: str) -> None:
    bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 1.6 / rows), aspect=14, pad=0.012)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["≤ ¼", "½", even, "2", "≥ 4"])
    bar.set_label(label)
    bar.outline.set_visible(False)
