"""Every tensor that a model needs and every tensor that its folder holds, matched one to one, or an error."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase

from parallel.errors import ConfigError
from trainer.interop.family import TOP
from trainer.interop.plan import Piece, Place
from trainer.interop.tensors import TensorFiles


@dataclass(frozen=True)
class Matched:
    """A piece and where it is on disk."""

    piece: Piece
    place: Place


@dataclass(frozen=True)
class Match:
    """All of a model.

    Attributes:
        matches: pieces in the order of the model.
        left_out: entries that the user asked to leave behind.
        copies: entries that repeat another byte for byte → that one.
    """

    matches: list[Matched]
    left_out: list[str]
    copies: dict[str, str]


def match(pieces: list[Piece], files: TensorFiles, drop: list[str], tied: bool) -> Match:
    """Find every piece, and account for every entry.

    Args:
        drop: patterns of entries to leave behind.
        tied: whether the head is the embedding table; a copy of it on disk is then no other tensor.

    Raises:
        ConfigError: a piece is missing, an entry belongs to nothing or has another shape, or a pattern
            matches nothing.
    """
    left_out = [name for name in files.entries if any(fnmatchcase(name, pattern) for pattern in drop)]
    for pattern in drop:
        if not any(fnmatchcase(name, pattern) for name in files.entries):
            raise ConfigError("drop", pattern, "matches no tensor", "leave it out")
    there = files.entries.keys() - set(left_out)
    matches, parts = [], defaultdict[str, set[Place]](set)
    for piece in pieces:
        place = next((place for place in (piece.hf, piece.fused) if place.name in there), None)
        if place is None:
            raise ConfigError(
                "HF_DIR", files.folder, f"holds no tensor {piece.hf.name}", "get the whole model"
            )
        assert place not in parts[place.name], place
        parts[place.name].add(place)
        matches.append(Matched(piece, place))
        files.check(place, piece.hf_shape)
    for name, places in parts.items():
        files.check_all_used(name, places)
    copies: dict[str, str] = {}
    for name in sorted(there - parts.keys()):
        table = TOP["embedding.weight"]
        if tied and name == TOP["head.weight"]:
            shape = files.entries[table].shape
            if files.entries[name].shape == shape and _same(files, name, table):
                copies[name] = table
                continue
            raise ConfigError(
                "HF_DIR",
                files.folder,
                f"{name} is not {table}, though config.json ties them",
                "mend config.json",
            )
        raise ConfigError(
            "HF_DIR",
            files.folder,
            f"holds a tensor {name}, which has no place in the model",
            f"drop='{name}' leaves it behind, if the model does without it",
        )
    return Match(matches, left_out, copies)


def _same(files: TensorFiles, name: str, other: str) -> bool:
    shape = files.entries[name].shape
    return files.read(Place(name), shape)[1] == files.read(Place(other), shape)[1]
