"""Reading a ``config.json`` so that no key of it goes unnoticed, and the rotary keys, which all families share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError
from trainer.config import ModelConfig, RopeScaling

Fields = dict[str, Any]
"""Dotted fields of a RunConfig and their values."""

HARMLESS = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache initializer_range bos_token_id "
    "eos_token_id pad_token_id attention_dropout max_position_embeddings router_aux_loss_coef "
    "output_router_logits router_jitter_noise pretraining_tp auto_map output_attentions "
    "output_hidden_states return_dict".split()
)
"""Keys that do not change the logits of a model in evaluation mode."""

_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}


class HfConfig:
    """A ``config.json`` of which every key is either read, known to be harmless, or an error.

    Attributes:
        path: the file, for messages.
        values: what is in it.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values
        self._read: set[str] = set()

    @classmethod
    def load(cls, folder: Path) -> HfConfig:
        """Read ``folder/config.json``.

        Raises:
            ConfigError: there is none, or it is no JSON object.
        """
        path = folder / "config.json"
        fix = "give a folder that transformers can load a model from"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError("HF_DIR", path, f"cannot be read: {error.strerror or error}", fix) from None
        except ValueError as error:
            raise ConfigError("HF_DIR", path, f"is not JSON: {error}", fix) from None
        if not isinstance(values, dict):
            raise ConfigError("HF_DIR", path, "is not a JSON object", fix)
        return cls(path, values)

    def take(self, *names: str, default: Any = None) -> Any:
        """The value of a key, under whichever of its names it has; ``default`` where it is absent or null.

        Raises:
            ConfigError: it stands there under two names with different values.
        """
        self._read |= set(names)
        found = {name: self.values[name] for name in names if self.values.get(name) is not None}
        values = list(found.values())
        if any(value != values[0] for value in values):
            raise self.wrong(" and ".join(found), values, "are two names of one thing", "keep one of them")
        return values[0] if values else default

    def size(self, *names: str, default: int | None = None) -> int:
        """A whole number; without a default it must be there."""
        value = self.take(*names, default=default)
        if type(value) is not int:
            raise self.wrong(names[0], value, "must be a whole number", "see the model's own config.json")
        return value

    def number(self, name: str, default: float) -> float:
        """A number."""
        value = self.take(name, default=default)
        if type(value) not in (int, float):
            raise self.wrong(name, value, "must be a number", f"{default}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.take(name, default=default)
        if type(value) is not bool:
            raise self.wrong(name, value, "must be true or false", str(default).lower())
        return value

    def must_be(self, name: str, allowed: Any, default: Any, why: str) -> None:
        """Refuse any value of a key but one; absent or null counts as ``default``."""
        value = self.take(name, default=default)
        if value != allowed:
            raise self.wrong(name, value, why, f"a model with {name}={json.dumps(allowed)}")

    def finish(self, harmless: frozenset[str]) -> None:
        """Refuse every key that has not been read and is not known to be harmless.

        Raises:
            ConfigError: naming the first such key.
        """
        for name in self.values:
            if name not in self._read and name not in harmless and not name.startswith("_"):
                raise self.wrong(
                    name,
                    json.dumps(self.values[name]),
                    "is a setting that Muster does not know, so it may compute something else",
                    "remove it from config.json if it does not change what the model computes",
                )

    def wrong(self, name: str, value: object, relation: str, fix: str) -> ConfigError:
        """The error about one key."""
        return ConfigError(f"{self.path}: {name}", value, relation, fix)


def read_rope(hf: HfConfig, default_theta: float) -> Fields:
    """``model.rope_theta`` and ``model.rope_scaling`` from both of the forms in use.

    Published models have ``rope_theta`` and ``rope_scaling``; transformers 5 writes both into
    ``rope_parameters``.

    Raises:
        ConfigError: a kind of scaling, or a setting of one, that Muster has not got.
    """
    given = {**(hf.take("rope_scaling") or {}), **(hf.take("rope_parameters") or {})}
    theta = given.pop("rope_theta", None)
    theta = hf.number("rope_theta", default_theta) if theta is None else float(theta)
    kinds = {given.pop(name, None) for name in ("rope_type", "type")} - {None}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in ("default", "llama3", "yarn"):
        raise hf.wrong("rope_type", kind, "Muster has default, llama3 and yarn", "a model with one of them")
    for where in (given.pop("partial_rotary_factor", None), hf.take("partial_rotary_factor")):
        if where not in (None, 1, 1.0):
            raise hf.wrong("partial_rotary_factor", where, "Muster rotates whole heads", "a model with 1.0")
    given = {name: value for name, value in given.items() if value is not None}
    fields: Fields = {"model.rope_theta": theta}
    if kind != "default":
        fields |= {f"model.rope_scaling.{name}": value for name, value in _scaling(hf, kind, given).items()}
    if given:
        name = next(iter(given))
        raise hf.wrong(
            name, given[name], f"is no setting of rope_type={kind} that Muster knows", "leave it out"
        )
    return fields


def _scaling(hf: HfConfig, kind: str, given: dict[str, Any]) -> Fields:
    """Fields of ``model.rope_scaling``; takes what it reads out of ``given``."""
    longest = hf.take("max_position_embeddings")
    old = hf.take("original_max_position_embeddings")
    old = given.pop("original_max_position_embeddings", longest) if old is None else old
    factor = given.pop("factor", None)
    if factor is None and kind == "yarn" and longest and old:
        factor = longest / old
    if factor is None or old is None:
        raise hf.wrong("rope_scaling", kind, "needs factor and original_max_position_embeddings", "give both")
    fields: Fields = {"kind": RopeScaling(kind), "factor": float(factor), "original_context": int(old)}
    if kind == "llama3":
        for name in ("low_freq_factor", "high_freq_factor"):
            if name not in given:
                raise hf.wrong("rope_scaling", kind, f"needs {name}", "give it")
            fields[name] = float(given.pop(name))
        return fields
    if given.pop("truncate", True) is not True:
        raise hf.wrong("truncate", False, "Muster rounds YaRN's range to whole dims", "a model with true")
    fields |= {name: float(given.pop(name, None) or default) for name, default in _YARN.items()}
    if "attention_factor" in given:
        fields["attention_factor"] = float(given.pop("attention_factor"))
    return fields


def write_rope(model: ModelConfig) -> dict[str, Any]:
    """The keys of the published form, which every version of transformers, and vLLM, read."""
    scaling = model.rope_scaling
    values: dict[str, Any] = {"rope_theta": model.rope_theta, "rope_scaling": None}
    if scaling.kind is RopeScaling.none:
        return values
    rope: dict[str, Any] = {
        "rope_type": scaling.kind.value,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context,
    }
    if scaling.kind is RopeScaling.llama3:
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    else:
        rope |= {"type": "yarn", "beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        rope |= {name: value for name in ("mscale", "mscale_all_dim") if (value := getattr(scaling, name))}
        if scaling.attention_factor is not None:
            rope["attention_factor"] = scaling.attention_factor
    return {**values, "rope_scaling": rope}
