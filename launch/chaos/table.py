"""A cluster's failure table, with the faults that stand for each of its rows."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from parallel.errors import ConfigError
from trainer.compose import CONF_DIR
from trainer.config_chaos import ClusterConfig
from trainer.faults.kinds import check_kind

_COLUMNS = ("component", "category", "interruptions")


@dataclass(frozen=True)
class Row:
    """A component that failed.

    Attributes:
        count: how often.
        kinds: kind of fault → weight.
        reason: why these kinds.
    """

    component: str
    category: str
    count: int
    kinds: dict[str, float]
    reason: str


def read_table(cluster: ClusterConfig) -> list[Row]:
    """The rows of ``cluster.interruptions`` with the kinds of ``cluster.faults``.

    Raises:
        ConfigError: there is no table, it cannot be read, or the two do not fit.
    """
    if cluster.interruptions is None:
        raise ConfigError(
            "cluster",
            cluster.name,
            "has no failure table to draw from",
            "cluster=llama3, or chaos.kinds=[kill]",
        )
    given = Path(cluster.interruptions).expanduser()
    path = CONF_DIR / "cluster" / given if len(given.parts) == 1 else given
    rows = []
    for line in _read(path):
        component = line["component"]
        if component not in cluster.faults:
            raise ConfigError(
                "cluster.faults",
                f"{{{', '.join(cluster.faults)}}}",
                f"says nothing of {component}, which {path.name} has",
                f"'{component}': {{kinds: {{kill: 1}}, reason: …}}",
            )
        mapped = cluster.faults[component]
        field = f"cluster.faults.{component}.kinds"
        for kind, weight in mapped.kinds.items():
            check_kind(kind, field, kind)
            if weight <= 0:
                raise ConfigError(field, f"{kind}: {weight}", "a weight is above 0", f"{kind}: 1")
        if not mapped.kinds:
            raise ConfigError(field, "{}", "stands for nothing", "{kill: 1}")
        count = int(line["interruptions"])
        rows.append(Row(component, line["category"], count, dict(mapped.kinds), mapped.reason))
    unknown = sorted(set(cluster.faults) - {row.component for row in rows})
    if unknown:
        raise ConfigError("cluster.faults", unknown[0], f"is no component of {path.name}", "leave it out")
    return rows


def _read(path: Path) -> list[dict[str, str]]:
    field, fix = "cluster.interruptions", f"a CSV with the columns {', '.join(_COLUMNS)}"
    try:
        lines = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except OSError as error:
        raise ConfigError(field, path, f"cannot be read: {error.strerror}", fix) from None
    for number, line in enumerate(lines, start=2):
        if any(not line.get(name) for name in _COLUMNS) or not str(line["interruptions"]).isdigit():
            raise ConfigError(field, f"{path}:{number}", "has no whole number of interruptions", fix)
    return lines
