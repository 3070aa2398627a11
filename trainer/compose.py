"""From YAML files and overrides to a RunConfig, and to the frozen file that every rank of a run reads.

``muster train`` and workers started by other launchers go through :func:`compose`, which never makes an
output directory. A run directory holds what :func:`freeze` wrote; :func:`load_frozen` reads it without
Hydra, and :func:`apply_overrides` changes single values of it for a resume. Torch-free.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from parallel.errors import ConfigError
from trainer import overrides as grammar
from trainer.config import RunConfig

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
"""Beside the packages, in a checkout and in an installed wheel alike."""
CONFIG_NAME = "config"


def register_schema() -> None:
    """Make RunConfig available to the defaults list of ``conf/config.yaml``. Harmless to repeat."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


register_schema()


def compose(overrides: list[str], config_dir: str | None = None) -> RunConfig:
    """The config that ``conf/`` and these overrides describe.

    Args:
        overrides: in Hydra's grammar, sweeps excepted.
        config_dir: a directory of the user's own groups, like Hydra's ``--config-dir``.

    Raises:
        ConfigError: whatever is wrong with an override or with a YAML file.
    """
    return to_run_config(compose_raw(overrides, config_dir)[0])


def compose_raw(overrides: list[str], config_dir: str | None = None) -> tuple[DictConfig, DictConfig]:
    """:func:`compose`, as OmegaConf, and Hydra's own node: what it would do beside composing."""
    parsed = grammar.parse(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise ConfigError(
                override.key_or_group,
                (override.input_line or "").partition("=")[2],
                "takes one value; several make a sweep",
                f"muster train -m {override.input_line}",
            )
    with hydra_initialised(parsed, config_dir) as searchpath:
        check_overrides(parsed, searchpath)
        lines = [grammar.normalise(override) for override in parsed if not _is_searchpath(override)]
        try:
            node = hydra_compose(CONFIG_NAME, [*lines, *searchpath], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise _explain(error, parsed) from error
    hydra = node.hydra
    with flag_override(node, ["struct", "readonly"], False):
        del node["hydra"]
    return node, hydra


def check_overrides(parsed: list[Override], searchpath: list[str]) -> None:
    """Check keys and group choices, sweeps included, inside of :func:`hydra_initialised`."""
    find = GlobalHydra.instance().config_loader().get_group_options
    groups = find("", ObjectType.GROUP, config_name=CONFIG_NAME, overrides=searchpath)

    def options(group: str) -> list[str]:
        return find(group, ObjectType.CONFIG, config_name=CONFIG_NAME, overrides=searchpath)

    for override in parsed:
        grammar.check(override, options, [name for name in groups if name != "hydra"])


def to_run_config(config: DictConfig) -> RunConfig:
    """The typed form of a composed config.

    Raises:
        ConfigError: a YAML file brought in a key that is not in the schema, or a missing value.
    """
    try:
        typed = OmegaConf.merge(OmegaConf.structured(RunConfig), config)
        result = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise _explain(error, []) from error
    assert isinstance(result, RunConfig)
    return result


@contextmanager
def hydra_initialised(parsed: list[Override], config_dir: str | None) -> Iterator[list[str]]:
    """Hydra initialised on conf/; gives the override that adds the user's own config directories."""
    extra: list[str] = []
    for override in parsed:
        if _is_searchpath(override):
            value: Any = override.value()
            extra += value if isinstance(value, list) else [str(value)]
    for entry in extra:
        if not entry.startswith("pkg://") and not Path(entry.removeprefix("file://")).is_dir():
            raise ConfigError(
                "hydra.searchpath", entry, "is not a directory", "file://DIRECTORY or pkg://PACKAGE"
            )
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigError(
                "--config-dir", config_dir, "is not a directory", "the folder of your own groups"
            )
        extra.append(f"file://{Path(config_dir).absolute()}")
    quoted = ",".join("'" + entry.replace("'", "\\'") + "'" for entry in extra)
    with initialize_config_dir(str(CONF_DIR), job_name="muster", version_base="1.3"):
        yield [f"hydra.searchpath=[{quoted}]"] if extra else []


def _is_searchpath(override: Override) -> bool:
    return override.key_or_group == "hydra.searchpath"


def _explain(error: Exception, parsed: list[Override]) -> ConfigError:
    """Hydra's, OmegaConf's or YAML's exception as one ConfigError."""
    if isinstance(error, yaml.YAMLError):
        return ConfigError("config file", "", f"is not valid YAML: {_one_line(error)}", "mend the file")
    if isinstance(error, MissingConfigException):
        known = f" (there are: {', '.join(error.options)})" if error.options else ""
        return ConfigError(
            error.missing_cfg_file or "config file",
            "",
            f"a defaults list names it and no such file exists{known}",
            "one that exists",
        )
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException):
        return ConfigError("config", "", _one_line(error), "see `muster train --info defaults`")
    key = cause.full_key or ""
    where = str(error).split(":")[0] if str(error).startswith("In '") else ""
    given = _given(key, parsed)
    if isinstance(cause, ConfigKeyError):
        place = f" ({where})" if where else ""
        return ConfigError(key, given, f"there is no such key{place}", grammar.nearest_fix(key, "…"))
    if isinstance(cause, MissingMandatoryValue):
        return ConfigError(key, "???", "has no default and must be given", f"{key}=…")
    if isinstance(cause, InterpolationResolutionError):
        return ConfigError(key, given, _one_line(cause), "set the value or the variable that it refers to")
    if isinstance(cause, ValidationError) and key in grammar.schema_types():
        if given == "":
            given = _quoted_value(cause)
        wrong = grammar.type_error(key, given)
        if where:
            wrong = ConfigError(key, given, f"{wrong.relation} ({where})", wrong.fix)
        return wrong
    return ConfigError(key or "config", given, _one_line(cause), "see `muster train --cfg job`")


def _given(key: str, parsed: list[Override]) -> object:
    for override in reversed(parsed):
        if override.key_or_group == key:
            value = override.value()
            return "null" if value is None else value
        if key.startswith(f"{override.key_or_group}."):
            return (override.input_line or "").partition("=")[2]
    return ""


def _quoted_value(error: OmegaConfBaseException) -> str:
    parts = str(error).split("'")
    return parts[1] if len(parts) > 2 else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("full_key:")[0].split())


def freeze(config: RunConfig, path: Path) -> None:
    """Write a config as YAML, whole or not at all. The user's relative paths become absolute."""
    values = plain(absolute_paths(config))
    write_atomically(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def plain(config: RunConfig) -> dict[str, Any]:
    """A config as mappings, lists and scalars; a choice is its name."""

    def of(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.name
        if is_dataclass(value):
            return {field.name: of(getattr(value, field.name)) for field in fields(value)}
        if isinstance(value, dict):
            return {key: of(entry) for key, entry in value.items()}
        return [of(entry) for entry in value] if isinstance(value, list) else value

    values = of(config)
    assert isinstance(values, dict)
    return values


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by one rename, after its content is on disk.

    Raises:
        ConfigError: the disk is full, or does not let us write there.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise ConfigError(
            "run.root",
            path,
            f"cannot be written: {error.strerror} ({len(text.encode()):,} bytes needed)",
            "free space there, or set run.root to a directory that you may write to",
        ) from error


def absolute_paths(config: RunConfig) -> RunConfig:
    """A copy whose paths mean the same from any working directory. URLs stay as they are."""
    c = copy.deepcopy(config)
    c.run.root = _absolute(c.run.root)
    c.data.cache_dir = _absolute(c.data.cache_dir)
    c.data.path = _absolute(c.data.path) if c.data.path is not None else None
    tokenizer, load_from = c.data.tokenizer.path, c.checkpoint.load_from
    c.data.tokenizer.path = _absolute(tokenizer) if tokenizer is not None else None
    c.checkpoint.load_from = _absolute(load_from) if load_from is not None else None
    for name in ("schedule", "reference"):
        path = getattr(c.chaos, name)
        setattr(c.chaos, name, _absolute(path) if path is not None else None)
    c.health.replay = _absolute(c.health.replay) if c.health.replay is not None else None
    c.engine.ds_config = _absolute(c.engine.ds_config) if c.engine.ds_config is not None else None
    return c


def _absolute(path: str) -> str:
    return path if "://" in path or "${" in path else str(Path(path).expanduser().absolute())


def load_frozen(path: Path) -> RunConfig:
    """Read what :func:`freeze` wrote.

    Raises:
        ConfigError: the file is missing, damaged, or holds a key or value that the schema does not know.
    """
    try:
        return copy.deepcopy(_parse(path.read_text(encoding="utf-8"), path))
    except FileNotFoundError:
        raise ConfigError(
            "config", path, "there is no such file", "a config.yaml of a run directory"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("config", path, f"cannot be read: {_one_line(error)}", _RESTORE) from None


@lru_cache(maxsize=1)  # what the standby of a node has read, the workers that it forks need not
def _parse(text: str, path: Path) -> RunConfig:
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ConfigError("config", path, "is not a mapping of config fields", _RESTORE)
    try:
        result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), content))
    except OmegaConfBaseException as error:
        wrong = _explain(error, [])
        raise ConfigError(
            wrong.field, wrong.value, f"{wrong.relation} (in {path})", f"{wrong.fix}; {_RESTORE}"
        ) from None
    assert isinstance(result, RunConfig)
    return result


_RESTORE = "restore it from the run's configs/ folder"


def apply_overrides(config: RunConfig, overrides: list[str]) -> RunConfig:
    """A copy of a frozen config with single values changed, as ``muster resume`` does.

    Group choices are refused: a group's file replaces many values at once, and which of the run's own
    values it should win over is not known any more.

    Raises:
        ConfigError: an unknown key, a wrong type, a group choice or a sweep.
    """
    groups = sorted(entry.name for entry in CONF_DIR.iterdir() if entry.is_dir())
    node = OmegaConf.structured(copy.deepcopy(config))
    for override in grammar.parse(overrides):
        key, value = override.key_or_group, override.value()
        if override.is_sweep_override():
            raise ConfigError(
                key, (override.input_line or "").partition("=")[2], "takes one value", "pick one"
            )
        if override.is_hydra_override() or (key in groups and not isinstance(value, dict)) or "/" in key:
            example = next(
                (name for name in grammar.schema_types() if name.startswith(f"{key}.")), "optim.lr"
            )
            raise ConfigError(
                key,
                value,
                "a run keeps the group files it was composed from; single values may change",
                f"set fields ({example}=…), or start a new run with checkpoint.load_from=RUN_DIR",
            )
        grammar.check(override, lambda group: [], [])
        try:
            OmegaConf.update(node, key, value, merge=True, force_add=grammar.is_free(key))
        except OmegaConfBaseException as error:
            raise _explain(error, [override]) from None
    result = OmegaConf.to_object(node)
    assert isinstance(result, RunConfig)
    return result
