"""What health.jsonl and the alarms of a run say: series by layer, maps of pairs and domains, episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.metrics.jsonl import read_records
from trainer.metrics.schema import HEALTH_FILE, Record

Array = NDArray[np.float64]


@dataclass
class Episode:
    """A trouble of one kind, and the layers that got into it together.

    Attributes:
        step: at which it was said.
        over: layer → step at which it was over there.
    """

    kind: str
    step: int
    since: int
    message: str
    remedy: str
    layers: list[int]
    over: dict[int, int] = field(default_factory=dict)

    @property
    def until(self) -> int | None:
        """When the last layer was out of it; None while one is not."""
        return max(self.over.values(), default=None) if len(self.over) == len(self.layers) else None


def read_health(run_dir: Path) -> list[Record]:
    """The records of a run's health.jsonl, of a step written twice the last; [] without a file."""
    records = read_records(run_dir / HEALTH_FILE)
    last = {_key(record): index for index, record in enumerate(records)}
    return [record for index, record in enumerate(records) if last[_key(record)] == index]


def _key(record: Record) -> tuple[object, ...]:
    return record.get("kind"), record.get("split"), record.get("step")


def episodes(events: Sequence[Record]) -> list[Episode]:
    """The routing's alarms, oldest first. A resume takes back what was said of later steps: they come again."""
    found: list[Episode] = []
    for event in events:
        step = int(event.get("step", 0))
        if event.get("event") == "resume":
            found = [episode for episode in found if episode.step <= step]
            for episode in found:
                episode.over = {layer: at for layer, at in episode.over.items() if at <= step}
        if event.get("event") != "alarm" or event.get("state") not in ("raised", "cleared"):
            continue
        kind, layers = str(event["kind"]), [int(entry["layer"]) for entry in event.get("evidence", [])]
        if event["state"] == "raised":
            since, message = int(event.get("since", step)), str(event["message"])
            found.append(Episode(kind, step, since, message, str(event.get("remedy", "")), layers))
            continue
        for episode in found:
            if episode.kind == kind:
                gone = set(layers) & set(episode.layers) - episode.over.keys()
                episode.over.update(dict.fromkeys(gone, step))
    return found


def newest_maps(health: Sequence[Record], *need: str) -> Record:
    """The newest counts that hold one of ``need``, held-out ones before those of training; {} without any."""
    maps = [r for r in health if r.get("kind") == "maps" and any(name in r for name in need)]
    held_out = [record for record in maps if record.get("split") == "valid"]
    return (held_out or maps or [{}])[-1]


def pair_ratios(record: Record) -> list[tuple[int, Array]]:
    """(layer, [E, E]) of each layer: tokens that chose both of two experts / what chance would give them.

    Chance keeps every expert's own load. NaN on the diagonal, for experts without a token, and for pairs that are
    not among the most frequent ones where only these were written.
    """
    num_experts, top_k = int(record["num_experts"]), int(record["top_k"])
    upper = np.triu_indices(num_experts, 1)
    found = []
    for place, layer in enumerate(record["layers"]):
        counts_E = np.array(record["counts"][place], dtype=np.float64)
        together = np.full((num_experts, num_experts), np.nan)
        if "pair_counts" in record:
            together[upper] = record["pair_counts"][place]
            total = np.nansum(together)
        else:
            for one, other, number in record["pairs"][place]:
                together[one, other] = number
            total = counts_E.sum() * (top_k - 1) / 2
        expected = np.triu(np.outer(counts_E, counts_E), 1)
        expected *= total / max(expected.sum(), 1.0)
        ratio = np.where(expected > 0, together / np.maximum(expected, 1e-12), np.nan)
        lower = (upper[1], upper[0])
        ratio[lower] = ratio[upper]
        found.append((int(layer), ratio))
    return found


def closest_pairs(ratio: Array, most: int) -> list[tuple[int, int, float]]:
    """(i, j, ratio) of the pairs that are together most often beyond chance."""
    known = np.where(np.isfinite(ratio), ratio, 0.0)
    row, column = np.triu_indices(len(ratio), 1)
    order = np.argsort(-known[row, column], kind="stable")[:most]
    return [(int(row[at]), int(column[at]), float(known[row[at], column[at]])) for at in order]


def domain_ratios(record: Record) -> tuple[list[str], list[tuple[int, Array, float]]]:
    """Names with their share of the pairs, and (layer, [G, E], bits) of each layer.

    A ratio is the share of a domain's pairs that go to an expert / the share of all pairs that do. Bits: the
    mutual information of domain and expert, 0 where the experts do not care.
    """
    counts_LGE = np.array(record["domain_counts"], dtype=np.float64)
    kept = counts_LGE[0].sum(1) > 0
    share_G = counts_LGE[0].sum(1) / max(1.0, counts_LGE[0].sum())
    names = [f"{name} {share:.0%}" for name, share in zip(record["domains"], share_G, strict=True)]
    layers = []
    for layer, counts_GE in zip(record["layers"], counts_LGE, strict=True):
        layers.append((int(layer), _relative(counts_GE[kept]), mutual_information(counts_GE)))
    return [name for name, keep in zip(names, kept, strict=True) if keep], layers


def _relative(counts_GE: Array) -> Array:
    share_GE = counts_GE / counts_GE.sum(1, keepdims=True)
    base_E = counts_GE.sum(0) / counts_GE.sum()
    return np.where(base_E > 0, share_GE / np.maximum(base_E, 1e-12), np.nan)


def mutual_information(counts_GE: Array) -> float:
    """I(domain; expert) in bits."""
    joint = counts_GE / max(1.0, counts_GE.sum())
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    known = joint > 0
    return float((joint[known] * np.log2(joint[known] / apart[known])).sum())


def specialisation(health: Sequence[Record]) -> tuple[Array, Array]:
    """(steps [n], bits [n, L]) of each evaluation whose domains were counted; [0] and [0, 0] without."""
    steps, bits = [], []
    for record in health:
        if record.get("kind") == "maps" and "domain_counts" in record:
            steps.append(float(record["step"]))
            bits.append([mutual_information(np.array(c, dtype=np.float64)) for c in record["domain_counts"]])
    if not steps or len({len(row) for row in bits}) > 1:
        return np.empty(0), np.empty((0, 0))
    return np.array(steps), np.array(bits)


def by_layer(health: Sequence[Record], name: str) -> tuple[list[int], Array, Array]:
    """(layers, steps [n], values [n, L, …]) of a number of the window; empty if it was never written."""
    records = [record for record in health if record.get("kind") == "window" and name in record]
    if records:
        records = [record for record in records if record["layers"] == records[-1]["layers"]]
    steps = np.array([record["step"] for record in records], dtype=np.float64)
    layers = [int(layer) for layer in records[-1]["layers"]] if records else []
    return layers, steps, np.array([record[name] for record in records], dtype=np.float64)
