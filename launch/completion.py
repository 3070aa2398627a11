"""Tab completion: ``eval "$(muster completion bash)"``; keys and groups come from Hydra's own completion."""

from __future__ import annotations

import contextlib
import io
import os
from enum import Enum
from pathlib import Path

from launch.convert import EXPORT
from launch.outcome import Outcome
from parallel.errors import ConfigError

COMMANDS = tuple(
    "train resume submit verify chaos generate evaluate import export report doctor completion".split()
)

_BASH = """\
_muster_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n'
    local word="${line##* }" prefix=""
    COMPREPLY=($(COMP_LINE="$line" "${COMP_WORDS[0]}" completion query 2>/dev/null))
    # Bash replaces only what follows the last word break, and "=" is one.
    if [[ "$COMP_WORDBREAKS" == *=* && "$word" == *=* ]]; then prefix="${word%"${word##*=}"}"; fi
    COMPREPLY=("${COMPREPLY[@]#"$prefix"}")
}
complete -o nospace -F _muster_complete muster
"""

_ZSH = """\
(( $+functions[compdef] )) || { autoload -U compinit && compinit }
_muster_complete() {
    local -a choices
    choices=("${(@f)$(COMP_LINE="$LBUFFER" "${words[1]}" completion query 2>/dev/null)}")
    compadd -Q -S '' -a choices
}
compdef _muster_complete muster
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH}

_OPTIONS = {
    "generate": [
        f"{name}="
        for name in (
            "prompt prompts_file num_samples max_new_tokens temperature top_p top_k seed batch_size json "
            "launcher.nproc_per_node parallel.ep"
        ).split()
    ],
    "evaluate": [
        f"{name}="
        for name in (
            "data eval.max_rows tasks include_path num_fewshot limit batch_size json "
            "launcher.nproc_per_node parallel.ep"
        ).split()
    ],
    "export": [f"{option}=" for option in EXPORT],
}


def main(argv: list[str]) -> Outcome:
    """``muster completion bash|zsh`` prints a script; ``query``, which the scripts call, prints choices.

    Raises:
        ConfigError: another shell.
    """
    if argv == ["query"]:
        line = os.environ.get("COMP_LINE", "")
        point = os.environ.get("COMP_POINT", "")
        return Outcome(0, "\n".join(complete(line[: int(point)] if point.isdigit() else line)))
    if len(argv) != 1 or argv[0] not in _SCRIPTS:
        shells = ", ".join(_SCRIPTS)
        raise ConfigError("shell", " ".join(argv), f"one of {shells}", 'eval "$(muster completion bash)"')
    return Outcome(0, _SCRIPTS[argv[0]])


def complete(line: str) -> list[str]:
    """What may stand at the end of a command line that begins with ``muster``; whole words."""
    words = line.split()
    word = "" if not words or line[-1:].isspace() else words.pop()
    if len(words) <= 1:
        return [f"{name} " for name in (*COMMANDS, "--help", "--version") if name.startswith(word)]
    command, before = words[1], words[2:]
    if command in ("train", "submit", "verify", "chaos") or (command == "resume" and before):
        return _overrides(before, word)
    if command == "import":
        return _overrides(before[2:], word) if len(before) > 1 else _folders(word)
    if command == "export" and len(before) == 1:
        return _folders(word)
    if command in ("resume", "generate", "evaluate", "report", "export"):
        if before:
            return [option for option in _OPTIONS.get(command, []) if option.startswith(word)]
        return _runs(word)
    if command == "completion" and not before:
        return [shell for shell in _SCRIPTS if shell.startswith(word)]
    return []


def _overrides(before: list[str], word: str) -> list[str]:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    from trainer.compose import CONFIG_NAME, hydra_initialised
    from trainer.overrides import schema_types

    if word.startswith("-"):
        flags = ("--multirun", "--cfg", "--info", "--config-dir", "--help")
        return [f"{flag} " for flag in flags if flag.startswith(word)]
    key, equals, _ = word.partition("=")
    kind = schema_types().get(key)
    if equals and isinstance(kind, type) and (issubclass(kind, Enum) or kind is bool):
        names = ["true", "false"] if kind is bool else [member.name for member in kind]
        return [f"{key}={name}" for name in names if f"{key}={name}".startswith(word)]
    # A line that is being typed may not parse yet; Hydra's parser then prints its usage.
    with hydra_initialised([], None), contextlib.redirect_stderr(io.StringIO()):
        plugin = DefaultCompletionPlugin(GlobalHydra.instance().config_loader())
        try:
            found = plugin._query(CONFIG_NAME, " ".join([*before, word]))
        except (Exception, SystemExit):
            return []
    return [choice for choice in found if word.startswith("hydra") or not choice.startswith("hydra")]


def _runs(word: str) -> list[str]:
    """Run directories under ``runs`` or under the folder typed so far, newest last; else folders."""
    roots = [Path(word) if Path(word).is_dir() else Path(word).parent, Path("runs")]
    for root in roots:
        for pattern in ("config.yaml", "*/config.yaml", "*/*/config.yaml"):
            found = [
                str(path.parent) for path in sorted(root.glob(pattern)) if str(path.parent).startswith(word)
            ]
            if found:
                return found
    return _folders(word)


def _folders(word: str) -> list[str]:
    folder, prefix = (Path(word), "") if word.endswith("/") else (Path(word).parent, Path(word).name)
    return [f"{path}/" for path in sorted(folder.glob(f"{prefix}*")) if path.is_dir()]
