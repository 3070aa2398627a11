"""The ``muster`` command."""

from __future__ import annotations

import errno
import importlib
import signal
import sys
from collections.abc import Callable

from launch.outcome import EXIT_CONFIG, EXIT_STOPPED, Outcome
from launch.output import forgive_closed_output
from parallel.errors import ConfigError

HELP = """\
muster: trains dense and Mixture-of-Experts language models that survive failures

  muster train [overrides]            train here; workers that die are restarted from the last checkpoint
  muster train -m [overrides]         sweep: every combination of comma-separated values, one after the other
  muster resume RUN_DIR [overrides]   go on from the newest checkpoint: longer, on other ranks, or as a branch
  muster submit launcher=slurm|kubernetes [--dry-run] [overrides]   write the job and queue it
  muster verify [overrides]           prove that this layout computes what one process would: certificate.json
  muster chaos [overrides]            train while faults strike; did it end with the same bits? verdict.json
  muster generate RUN_DIR [options]   sample from a run or a checkpoint, on as many ranks as it takes
  muster evaluate RUN_DIR [options]   its loss on held-out or other text (data=…), or lm-eval tasks (tasks=…)
  muster import HF_DIR OUT [overrides]   a Hugging Face model as a run that goes on training it
  muster export RUN_DIR HF_DIR        a run as a Hugging Face model, for transformers and vLLM
  muster report RUN_DIR               write report.html: curves, expert load, failures
  muster doctor                       what this machine has, and what is missing
  muster completion bash|zsh          tab completion: eval "$(muster completion bash)"

An override is key=value (optim.lr=1e-3) or the choice of a file of conf/ (layout=mixtral).
`muster train --help` lists the choices, `muster train --cfg job` prints every key with its value.

  muster train experiment=quickstart
  muster train layout=deepseek model=small launcher.nproc_per_node=4 parallel.ep=4
  muster train data=text data.path='notes/*.txt' train.steps=500 run.name=notes
  muster train -m layout=dense,mixtral optim.lr=1e-3,3e-4
  muster resume runs/quickstart/ID train.steps=600
  muster resume runs/quickstart/ID launcher.nproc_per_node=1 parallel.ep=1
  muster resume runs/quickstart/ID run.name=hot optim.lr=3e-3
  muster generate runs/quickstart/ID prompt="def " temperature=0.8

Exit codes: 0 done · 2 a config or input error · 75 stopped, resumable · 70 gave up after repeated failures
"""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_COMMANDS = {
    "train": ("launch.train", "main"),
    "resume": ("launch.resume", "main"),
    "submit": ("launch.submit", "main"),
    "verify": ("launch.verify", "main"),
    "chaos": ("launch.chaos.command", "main"),
    "generate": ("launch.sample", "generate"),
    "evaluate": ("launch.evaluate", "main"),
    "import": ("launch.convert", "import_"),
    "export": ("launch.convert", "export"),
    "report": ("launch.sample", "report"),
    "doctor": ("launch.doctor", "main"),
    "completion": ("launch.completion", "main"),
}


def main() -> int:
    """Run the command of this process's arguments; its exit code."""
    return report(lambda: run(sys.argv[1:]))


def report(command: Callable[[], Outcome]) -> int:
    """Run a command, tell the user how it ended, and return its exit code."""
    forgive_closed_output()
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until an agent listens, they are like Ctrl-C
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        outcome = command()
    except ConfigError as error:
        outcome = Outcome(EXIT_CONFIG, str(error))
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        outcome = Outcome(EXIT_CONFIG, f"{place}{error.strerror}. Fix: free space there, or set run.root.")
    except KeyboardInterrupt:
        outcome = Outcome(EXIT_STOPPED, "Stopped.")
    if outcome.message:
        stream = sys.stdout if outcome.code == 0 else sys.stderr
        print(outcome.message, file=stream, flush=True)
    return outcome.code


def run(argv: list[str]) -> Outcome:
    """Dispatch to a subcommand. Only the chosen one is imported.

    Raises:
        ConfigError: an unknown command, or what the command raises.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        return Outcome(0, HELP.rstrip())
    if argv[0] == "--version":
        from importlib import metadata

        return Outcome(0, f"muster {metadata.version('muster-moe')}")
    command, rest = argv[0], argv[1:]
    if command not in _COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, _COMMANDS, n=1, cutoff=0.4)
        guess = f"muster {near[0]}" if near else "muster train experiment=quickstart"
        raise ConfigError("command", command, f"one of {', '.join(_COMMANDS)}", guess)
    if command != "train" and rest in (["-h"], ["--help"]):  # train's own help lists the config groups
        lines = [line for line in HELP.splitlines() if line.startswith(f"  muster {command}")]
        return Outcome(0, "\n".join(lines))
    module, function = _COMMANDS[command]
    outcome = getattr(importlib.import_module(module), function)(rest)
    assert isinstance(outcome, Outcome)
    return outcome


if __name__ == "__main__":
    raise SystemExit(main())
