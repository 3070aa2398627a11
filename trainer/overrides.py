"""What a user may write after ``muster train``: the keys of the schema, and what was probably meant.

Hydra accepts ``+foo=1`` for any ``foo`` and names a mistyped key in words of its own; these checks run
before it, so that every mistake is one :class:`~parallel.errors.ConfigError` with the nearest thing that
would have worked. Torch-free.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf

from parallel.errors import ConfigError
from trainer.config import RunConfig

GroupOptions = Callable[[str], list[str]]
"""Config group → the names of its files; empty for what is no group."""


@cache
def schema_types() -> dict[str, Any]:
    """Every dotted key of the schema, sections included, with its type (``X | None`` reduced to ``X``)."""
    found: dict[str, Any] = {}

    def walk(section: type, prefix: str) -> None:
        for name, kind in typing.get_type_hints(section).items():
            kind = _without_none(kind)
            found[prefix + name] = kind
            if isinstance(kind, type) and is_dataclass(kind):
                walk(kind, f"{prefix}{name}.")

    walk(RunConfig, "")
    return found


def is_free(key: str) -> bool:
    """Whether ``key`` is a free dict or lies below one (``model.kwargs.width``), where any name goes."""
    known, parts = schema_types(), key.split(".")
    above = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(typing.get_origin(known.get(parent)) is dict for parent in above)


def nearest_key(key: str) -> str | None:
    """The key of the schema that ``key`` was probably meant to be."""
    same_leaf = _same_leaf(key)
    if same_leaf:
        return _nearest(key, same_leaf) or same_leaf[0]
    return _nearest(key, schema_types())


def nearest_fix(key: str, value: str) -> str:
    """What to write instead of an unknown key."""
    near = nearest_key(key)
    return f"did you mean {near}={value}" if near else "see every key with `muster train --cfg job`"


def _same_leaf(key: str) -> list[str]:
    values = [name for name, kind in schema_types().items() if not is_dataclass(kind)]
    return [name for name in values if name.rpartition(".")[2] == key.rpartition(".")[2]]


def parse(overrides: Iterable[str]) -> list[Override]:
    """Read Hydra's override grammar.

    Raises:
        ConfigError: not of the form ``key=value``, or a value that the grammar cannot read.
    """
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        if text.startswith("-"):
            raise ConfigError(text, "", "overrides have no dashes", text.lstrip("-"))
        if not text.startswith("~") and "=" not in text:
            meant = nearest_key(text.lstrip("+-")) or "optim.lr"
            raise ConfigError(text, "", "an override is key=value", f"write it like {meant}=…")
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            key, _, value = text.partition("=")
            raise ConfigError(
                key or text,
                value,
                f"cannot be read as an override ({_one_line(str(error))})",
                f"quote a value with special characters: \"{key}='…'\"",
            ) from None
    return parsed


def check(override: Override, options: GroupOptions, group_names: list[str]) -> None:
    """Reject what names neither a config group and one of its files nor a field of the schema.

    Raises:
        ConfigError: an unknown key or group value, whatever its prefix (``+``, ``++``, ``~``).
    """
    key = override.key_or_group
    if override.is_hydra_override():
        return
    if override.package is not None or "/" in key or key in group_names:
        _check_group(override, options(key), group_names)
        return
    if is_free(key):
        return
    if key not in schema_types():
        group = _nearest(key, group_names) if "." not in key and not _same_leaf(key) else None
        fix = (
            f"{group}=… with one of {', '.join(options(group))}"
            if group
            else nearest_fix(key, _shown(override))
        )
        raise ConfigError(key, _shown(override), "there is no such key", fix)
    if override.type is OverrideType.DEL:
        raise ConfigError(
            f"~{key}", "", "a field of the schema cannot be deleted", f"{key}=null or its default"
        )


def normalise(override: Override) -> str:
    """The override as Hydra wants it: ``model.kwargs.width=3`` needs no ``++`` from the user."""
    assert override.input_line is not None
    if override.type is OverrideType.CHANGE and is_free(override.key_or_group):
        return f"++{override.input_line}"
    return override.input_line


def type_error(key: str, value: object) -> ConfigError:
    """The message for a value that its field's type does not take."""
    kind = schema_types().get(key)
    wanted, default = "a value of another type", _default(key)
    fix = f"{key}={default}" if default is not None else f"another value for {key}"
    if kind is int and isinstance(value, float) and value.is_integer():
        fix = f"{key}={int(value)}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [member.name for member in kind]
        wanted = f"one of {', '.join(names)}"
        fix = f"{key}={_nearest(str(value), names) or names[0]}"
    elif kind in _TYPE_NAMES:
        wanted = _TYPE_NAMES[kind]
    elif is_dataclass(kind):
        wanted = "a section, not a value"
        fix = "name one of its fields: " + ", ".join(n for n in schema_types() if n.startswith(f"{key}."))
    return ConfigError(key, value, f"must be {wanted}", fix)


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _check_group(override: Override, options: list[str], group_names: list[str]) -> None:
    group = override.key_or_group
    if not options:
        dotted = group.replace("/", ".")
        near = dotted if dotted in schema_types() else _nearest(group, group_names)
        fix = f"did you mean {near}" if near else f"one of {', '.join(group_names)}"
        raise ConfigError(group, _shown(override), "there is no such config group", fix)
    if override.type in (OverrideType.ADD, OverrideType.FORCE_ADD) and group in group_names:
        raise ConfigError(
            f"+{group}", _shown(override), "the group is chosen without a +", f"{group}={_shown(override)}"
        )
    if override.is_sweep_override() or override.type is OverrideType.DEL:
        return
    value = override.value()
    if value is None:
        raise ConfigError(group, "null", "a group is left out by deleting its choice", f"'~{group}'")
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, dict):
            raise ConfigError(
                group,
                _shown(override),
                "is a config group, chosen by name",
                f"set single fields: {group}.…=…",
            )
        if "/" not in str(name) and str(name) not in options:
            near = _nearest(str(name), options)
            fix = f"{group}={near}" if near else f"{group}={options[0]}"
            raise ConfigError(group, name, f"must be one of {', '.join(options)}", fix)


def _shown(override: Override) -> str:
    return (override.input_line or "").partition("=")[2]


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _nearest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), None)


def _default(key: str) -> object:
    value = OmegaConf.select(OmegaConf.structured(RunConfig), key)
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, (int, float, bool, str)) else None


def _one_line(text: str) -> str:
    return " ".join(text.split("\nSee https")[0].split())
