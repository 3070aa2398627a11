"""The report's sections about routing: alarms, balance of the ranks, pairs of experts, domains."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TypeVar

import numpy as np

from trainer.metrics import health
from trainer.metrics.history import History
from trainer.metrics.html import section, wide
from trainer.metrics.map_plots import Matrix, heat_maps, matrix_maps
from trainer.metrics.plots import Line, line_plot

T = TypeVar("T")

MAX_LAYERS = 64
_MAX_MATRICES = 12
_MAX_PAIRS = 8


def sampled(layers: Sequence[T], most: int) -> tuple[list[T], str]:
    """Every n-th of the layers, which shows depth as well as all would, and what to say of it."""
    if len(layers) <= most:
        return list(layers), ""
    kept = np.unique(np.linspace(0, len(layers) - 1, most).round().astype(int))
    return [layers[index] for index in kept], f" {most} of {len(layers)} layers."


def health_sections(history: History) -> list[str]:
    """All that there is to show, in the order of the page."""
    return [_alarms(history), _ranks(history), _pairs(history), _domains(history)]


def _alarms(history: History) -> str:
    found = health.episodes(history.events)
    if not found:
        watched = any(record.get("kind") == "window" for record in history.health)
        return section("Alarms", "", "The routing never raised an alarm.") if watched else ""
    rows = []
    for episode in reversed(found):
        until = f"{episode.until:,}" if episode.until is not None else "<b>still</b>"
        advice = f'<div class="note">{escape(episode.remedy)}</div>' if episode.remedy else ""
        css = "plain" if episode.until is not None else "alarm"
        rows.append(
            f'<tr class="{css}"><td>{escape(episode.kind.replace("_", " "))}</td>'
            f'<td class="n">{episode.since:,}</td><td class="n">{until}</td>'
            f'<td class="said">{escape(episode.message)}{advice}</td></tr>'
        )
    head = '<tr><th>alarm</th><th class="n">since step</th><th class="n">until</th><th></th></tr>'
    still = sum(episode.until is None for episode in found)
    note = (
        f"{len(found)} of the routing, {still} not over."
        if still
        else f"{len(found)} of the routing, all over."
    )
    return section("Alarms", f'<div class="wide"><table>{head}{"".join(rows)}</table></div>', note)


def _ranks(history: History) -> str:
    layers, steps, share_NLR = health.by_layer(history.health, "rank_share")
    if not len(steps):
        return ""
    ratio_NLR = share_NLR * share_NLR.shape[2]
    note = (
        "Routed pairs sent to the experts of each ep rank, as a multiple of an even share (mean over the window). "
        "The others wait for the busiest one."
    )
    shown = list(range(len(layers)))
    if len(layers) > _MAX_MATRICES:
        shown = sorted(np.argsort(-ratio_NLR.max(axis=(0, 2)), kind="stable")[:_MAX_MATRICES].tolist())
        note += f" The {_MAX_MATRICES} least even of {len(layers)} layers."
    maps = heat_maps([(layers[at], steps, ratio_NLR[:, at]) for at in shown], ylabel="ep rank")
    return section("Balance of the ranks", wide(maps), note)


def _pairs(history: History) -> str:
    record = health.newest_maps(history.health, "pairs", "pair_counts")
    if not record:
        return ""
    shown, more = sampled(health.pair_ratios(record), _MAX_MATRICES)
    note = (
        f"Which experts a token chose together ({_where(record)}), as a multiple of what chance would give experts "
        "that are as busy."
    )
    if "pairs" in record:  # a picture of so many experts would show dust
        rows = [
            f'<tr><td class="n">{layer}</td><td class="said">{_closest(ratio)}</td></tr>'
            for layer, ratio in shown
        ]
        head = '<tr><th class="n">layer</th><th>of its most frequent pairs, those furthest above chance</th></tr>'
        return section("Experts chosen together", f"<table>{head}{''.join(rows)}</table>", note + more)
    picture = matrix_maps(
        [Matrix(f"layer {layer}", ratio) for layer, ratio in shown],
        xlabel="expert",
        ylabel="expert",
        even="1 chance",
        label="together / by chance",
    )
    return section("Experts chosen together", wide(picture), note + more)


def _closest(ratio: health.Array) -> str:
    pairs = health.closest_pairs(ratio, _MAX_PAIRS)
    return " · ".join(f"{one} + {other} <b>{times:.1f}×</b>" for one, other, times in pairs if times > 0)


def _domains(history: History) -> str:
    record = health.newest_maps(history.health, "domain_counts")
    if not record:
        return ""
    names, layers = health.domain_ratios(record)
    shown, more = sampled(layers, _MAX_MATRICES)
    picture = matrix_maps(
        [Matrix(f"layer {layer}   {bits:.3f} bits", ratio) for layer, ratio, bits in shown],
        xlabel="expert",
        ylabel="",
        row_names=names,
        even="1 even",
        label="share / all data's share",
    )
    note = (
        f"Which data goes to which expert ({_where(record)}): the share of a domain's tokens that an expert gets, "
        "as a multiple of its share of all data. Bits: how much an expert's choice tells of the domain (mutual "
        "information), 0 where experts do not care."
    )
    steps, bits_NL = health.specialisation(history.health)
    over_time = ""
    if len(steps) > 1:
        svg = line_plot(_bit_lines(record["layers"], steps, bits_NL), unit="bit", size=(13.0, 2.2))
        over_time = f"<h3>Specialisation over time</h3>{wide(svg)}"
    return section("Specialisation by domain", wide(picture) + over_time, note + more)


def _bit_lines(layers: Sequence[int], steps: health.Array, bits_NL: health.Array) -> list[Line]:
    """The mean over layers, and the layers at both ends."""
    if bits_NL.shape[1] == 1:
        return [Line(steps, bits_NL[:, 0], dots=True)]
    ends = [(0, "c2"), (bits_NL.shape[1] - 1, "good")]
    return [
        Line(steps, bits_NL.mean(1), label="mean", dots=True),
        *(
            Line(steps, bits_NL[:, at], label=f"layer {layers[at]}", color=color, dots=True)
            for at, color in ends
        ),
    ]


def _where(record: dict[str, object]) -> str:
    split = "held-out rows" if record.get("split") == "valid" else "one step's rows"
    return f"{split}, step {record['step']:,}"
