"""The config of a run that begins with an imported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from parallel.errors import ConfigError
from trainer import overrides as grammar
from trainer.checkpoint.format import step_name
from trainer.compose import absolute_paths, compose
from trainer.config import Machine, RunConfig, resolve
from trainer.environment import count_gpus
from trainer.interop.family import Family
from trainer.interop.hf_config import Fields
from trainer.rules import validate


def new_run(
    family: Family, fields: Fields, overrides: list[str], target: Path
) -> tuple[RunConfig, RunConfig]:
    """What the user wrote with the model's fields in it, and the same resolved.

    Args:
        overrides: of data, optim, train, parallel, layout.balance, …
        target: the run directory.

    Raises:
        ConfigError: an override is wrong, or would make another model of it.
    """
    for override in grammar.parse(overrides):
        key = override.key_or_group
        if key in ("model", "model.name", "run.root", "run.name", "run.id") or key.startswith(
            "checkpoint.load"
        ):
            raise ConfigError(key, override.value(), "comes with the import", "leave it out")
    layout = [] if any(o.startswith("layout=") for o in overrides) else [f"layout={family.layout}"]
    asked = compose([*layout, *overrides])
    for override in grammar.parse(overrides):
        key = override.key_or_group
        if key in fields and _get(asked, key) != fields[key]:
            value = getattr(fields[key], "value", fields[key])
            raise ConfigError(key, override.value(), f"the model's config.json says {value}", "leave it out")
    for key, value in fields.items():
        section, _, name = key.rpartition(".")
        setattr(_get(asked, section), name, value)
    asked.model.name = family.model_type
    target = target.absolute()
    asked.run.root = str(target.parent.parent)
    asked.run.name, asked.run.id = target.parent.name or "imported", target.name
    asked = absolute_paths(asked)
    config = resolve(asked, Machine.here(count_gpus()))
    validate(config)
    return asked, config


def write_group(fields: Fields, family: Family, tokenizer: Path, target: Path, folder: Path) -> None:
    """``conf/model/imported.yaml``: ``muster train --config-dir OUT/conf model=imported`` starts from it."""
    content: dict[str, Any] = {"defaults": [{"override /layout": family.layout}]}
    node = OmegaConf.create({})
    for key, value in fields.items():
        OmegaConf.update(node, key, getattr(value, "value", value))
    values = OmegaConf.to_container(node)
    assert isinstance(values, dict)
    content |= {str(key): value for key, value in values.items()}
    content["model"]["name"] = family.model_type
    content["data"] = {"tokenizer": {"path": str(tokenizer)}}
    content["checkpoint"] = {
        "load_from": str(target / "checkpoints" / step_name(0)),
        "load_weights_only": True,
    }
    path = folder / "conf" / "model" / "imported.yaml"
    path.parent.mkdir(parents=True)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    path.write_text(f"# @package _global_\n# {family.model_type}, imported.\n{text}", encoding="utf-8")


def _get(config: RunConfig, key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = getattr(node, name)
    return node
