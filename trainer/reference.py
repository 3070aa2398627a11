"""The page of all config fields: ``python -m trainer.reference > docs/configuration.md``.

Types and meanings come from the dataclasses in ``trainer/config*.py`` and the strings under their fields,
defaults from what ``muster train`` composes without overrides, groups from the files of ``conf/``. Torch-free.
"""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer import config as schema
from trainer.compose import CONF_DIR, compose_raw
from trainer.config import RunConfig

MEANINGS = {
    "device": "Where to train; auto: CUDA where every local process can have a GPU of its own, else the CPU.",
    "run.root": "Folder of all runs.",
    "run.name": "Folder of this run's kind under run.root; a run is run.root/run.name/run.id.",
    "model.name": "A label for logs and the report.",
    "model.dim": "Width of the residual stream.",
    "model.num_layers": "Transformer blocks.",
    "model.num_heads": "Query heads.",
    "model.num_kv_heads": "Key and value heads; must divide num_heads.",
    "model.attention": "gqa: grouped-query attention; mla: multi-head latent attention.",
    "model.qk_norm": "RMSNorm of queries and keys: none, by head, or over all heads at once (full).",
    "model.mla.kv_lora_rank": "Width of the key/value latent.",
    "model.mla.qk_nope_head_dim": "Part of a query or key head that is not rotated.",
    "model.mla.qk_rope_head_dim": "Part of a query or key head that is rotated; even.",
    "model.mla.v_head_dim": "Width of a value head.",
    "model.rope_theta": "Base of the rotary embedding.",
    "model.norm_eps": "Added to the mean square in every RMSNorm.",
    "model.tied_embeddings": "Whether the output head is the embedding table.",
    "model.init_std": "Standard deviation of initial weights; layers that write into the residual stream get "
    "1 / sqrt(2 · num_layers) of it.",
    "model.kwargs": "Passed to model.target.",
    "layout.name": "A label; the layout called dense may have no experts.",
    "layout.top_k": "Experts that each token goes to.",
    "layout.granularity": "How many experts share the width of one dense feed-forward layer.",
    "layout.first_dense_layers": "Layers at the bottom that stay dense.",
    "layout.score": "How router logits become scores.",
    "layout.route_scale": "Factor on the combine weights.",
    "layout.num_groups": "Groups that the experts are divided into, for group-limited routing.",
    "layout.kwargs": "Passed to layout.target.",
    "parallel.dp_replicate": "Full copies of the model (HSDP).",
    "parallel.cp": "Reserved: values above 1 are rejected.",
    "parallel.tp": "Reserved: values above 1 are rejected.",
    "parallel.pp": "Reserved: values above 1 are rejected.",
    "parallel.ep": "Ranks that one full set of experts is spread over; carved from dp_shard, never a factor of "
    "the world.",
    "engine.name": "Who shards and steps the model.",
    "optim.lr": "Peak learning rate.",
    "optim.beta1": "Decay of the first moment.",
    "optim.beta2": "Decay of the second moment.",
    "optim.eps": "Added to the root of the second moment.",
    "optim.schedule": "After the warm-up: constant, a cosine, or wsd (stable, then a linear decay).",
    "optim.warmup_steps": "Steps of linear warm-up.",
    "optim.min_lr_ratio": "Share of optim.lr that the schedule ends at.",
    "data.source": "Where documents come from; chosen with the group: data=jsonl.",
    "data.subset": "hub: the dataset's configuration.",
    "data.text_field": "jsonl, parquet, hub: the field that holds the text.",
    "data.tokenizer.vocab_size": "Of the tokenizer that is trained where none is given.",
    "data.cache_dir": "Tokenizer and packed rows, by fingerprint.",
    "data.kwargs": "Read by data.target.",
    "train.steps": "Optimizer steps of the whole run.",
    "train.seq_len": "Tokens of a packed row.",
    "train.seed": "Initial weights, order of the samples and draws of the text sample.",
    "train.activation_checkpointing": "Recompute each block in backward; recorded routing is replayed.",
    "eval.sample_prompt": "What that text begins with.",
    "checkpoint.keep_last": "Newest checkpoints that are kept; the best one and keep_every's are kept besides.",
    "resilience.collective_timeout_seconds": "After which a collective that a peer does not answer is an error.",
    "logger.terminal": "auto: a live view on a terminal, lines in a pipe; rich, plain: always; off: none.",
    "logger.wandb.mode": "offline: files in the run directory; online: needs a login; disabled: none.",
    "logger.wandb.project": "W&B project.",
    "logger.wandb.entity": "W&B team or user; null: your default.",
    "launcher.name": "Who starts the nodes: `local` (you, on each), `ssh`, or `muster submit` for the others.",
    "callbacks": "Objects of your own with hooks, each {target: package.module:Class, kwargs: {…}}.",
}
"""Meanings of fields that carry no string of their own in the schema."""

INTRO = """\
# Configuration

<!-- Printed by `python -m trainer.reference > docs/configuration.md`; edit trainer/config*.py, conf/ or that
module. -->

A run is described by one config. `muster train` composes it from the files of [`conf/`](../conf) and from
what you write on the command line:

```bash
muster train layout=deepseek model=small optim.lr=3e-4
```

`layout=deepseek` picks a file of a *group* (a folder of `conf/`); `optim.lr=3e-4` sets one *field*. Later
files win over earlier ones and fields win over files. A key that does not exist is an error that names the
nearest one.

```bash
muster train --help
muster train --cfg job layout=switch
muster train --info defaults
```

The first lists the groups and their choices, the second prints the config that a command line composes to,
the third says which files it came from. The config in force is kept as `config.yaml` in the run directory.
Groups of your own: [extending.md](extending.md).
"""


@dataclass(frozen=True)
class Field:
    """One value of the schema: dotted name, type as text, default as text, meaning."""

    name: str
    kind: str
    default: str
    meaning: str


def page() -> str:
    """The whole page, Markdown."""
    lines = [INTRO, "## Groups\n", *_groups()]
    defaults = OmegaConf.to_container(compose_raw([])[0], resolve=False, enum_to_str=True)
    assert isinstance(defaults, dict)
    lines += [
        "\n## Fields\n",
        "*Default* is what `muster train` uses without any override: `layout=mixtral model=tiny data=stdlib`.",
        "A `-1` or `auto` is filled in from the machine and from other fields before the config is frozen.",
    ]
    section = None
    for field in fields(RunConfig, defaults, ""):
        top = field.name.partition(".")[0] if "." in field.name else ""
        if top != section:
            section = top
            lines += [f"\n### {top}\n" if top else "", "| field | type | default | meaning |"]
            lines.append("| --- | --- | --- | --- |")
        lines.append(f"| `{field.name}` | {field.kind} | {field.default} | {field.meaning} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def fields(section: type, defaults: Any, prefix: str) -> Iterator[Field]:
    """Every value below a section of the schema, in the order of the file, values of the top first."""
    hints, notes = typing.get_type_hints(section), field_notes(section)
    inner = [name for name, kind in hints.items() if is_dataclass(kind)]
    for name, kind in hints.items():
        if name not in inner:
            meaning = notes.get(name) or MEANINGS[prefix + name]
            yield Field(prefix + name, _kind(kind), _shown(defaults[name]), _cell(meaning))
    for name in inner:
        yield from fields(hints[name], defaults[name], f"{prefix}{name}.")


def field_notes(section: type) -> dict[str, str]:
    """Field → the string that follows it in the dataclass's source."""
    tree = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(tree, ast.ClassDef)
    notes = {}
    for field, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
            assert isinstance(field.target, ast.Name) and isinstance(after.value, ast.Constant)
            notes[field.target.id] = " ".join(str(after.value.value).split())
    return notes


def _groups() -> Iterator[str]:
    yield "| group | choices | default |"
    yield "| --- | --- | --- |"
    chosen: dict[str, Any] = {}
    for entry in OmegaConf.to_container(OmegaConf.load(CONF_DIR / "config.yaml"))["defaults"]:  # type: ignore[index,call-overload]
        chosen.update(entry if isinstance(entry, dict) else {})
    for folder in sorted(path for path in CONF_DIR.iterdir() if path.is_dir()):
        choices = ", ".join(f"`{path.stem}`" for path in _files(folder))
        default = chosen.get(folder.name)
        yield f"| [`{folder.name}`](../conf/{folder.name}) | {choices} | {_shown(default)} |"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.yaml"))


def _kind(kind: Any) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{member.name}`" for member in kind)
    if kind is type(None):
        return "null"
    if kind == list[schema.CallbackConfig]:
        return "list"
    return "dict" if typing.get_origin(kind) is dict else str(kind.__name__)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
