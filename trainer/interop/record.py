"""What a conversion leaves beside its output: which tensor became which, once each, with checksums."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = "muster-conversion"
VERSION = 1


@dataclass(frozen=True)
class Row:
    """One tensor on disk and the box of Muster's tensor that it is.

    Attributes:
        hf: name of the entry; ``part`` the part of it that this is, None for all of it.
        hf_dtype, hf_shape: of that part.
        checksum: xxh3_128 of its bytes on disk.
        muster: name of Muster's tensor; ``offsets`` and ``shape`` of the box.
        muster_dtype: of Muster's tensor.
        change: how the values are rearranged between the two.
    """

    hf: str
    part: str | None
    hf_dtype: str
    hf_shape: tuple[int, ...]
    checksum: str
    muster: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    muster_dtype: str
    change: str


@dataclass(frozen=True)
class Conversion:
    """A whole conversion.

    Attributes:
        direction: ``import`` or ``export``.
        family: of models.
        source, output: folders.
        rows: the tensors.
        left_out: entries that the user asked to leave behind.
        copies: entries that repeat another one byte for byte → that one.
        fresh: buffers of Muster's that only training reads, and that begin at zero.
        weights_digest: of the Muster checkpoint.
        verification: what :func:`trainer.interop.verify.compare` found; None: it was not asked for.
    """

    direction: str
    family: str
    source: str
    output: str
    rows: list[Row]
    left_out: list[str]
    copies: dict[str, str]
    fresh: list[str]
    weights_digest: str
    verification: dict[str, Any] | None

    def write(self, path: Path) -> None:
        """As JSON, a tensor a line."""
        head = {"format": FORMAT, "version": VERSION, **asdict(self)}
        rows = head.pop("rows")
        head["num_tensors"] = len(rows)
        text = json.dumps(head, indent=1).removesuffix("\n}")
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        path.write_text(f'{text},\n "tensors": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


def dtypes_of(path: Path) -> dict[str, str]:
    """Entry → dtype on disk of an earlier conversion; {} if there is none at ``path``."""
    try:
        tensors: Iterable[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["tensors"]
        return {row["hf"]: row["hf_dtype"] for row in tensors if row["part"] is None}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
