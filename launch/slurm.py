"""The batch script of a run under Slurm: one agent a node, saved and queued again ahead of the time limit.

::

    sbatch job.sbatch ─▶ srun: `muster resume` on every node ─▶ 0 done · 2, 70 passed on
            ▲                  │ USR1 signal_seconds before the limit: saved, 75
            └── scontrol requeue ◀┘     a node fails: Slurm itself queues the job again

The first start and every later one are the same command: a run without checkpoints begins at the beginning, a
finished one says so and ends with 0.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from launch.outcome import EXIT_STOPPED, Outcome
from parallel.errors import ConfigError
from trainer.compose import write_atomically
from trainer.config import RunConfig
from trainer.config_launcher import LauncherConfig, num_hosts
from trainer.rundir import RunDirectory

SCRIPT = "job.sbatch"
_LEAVE_SECONDS = 60
"""How much later than the first agent the last one may leave before Slurm ends it."""


def batch_script(config: RunConfig, run_dir: Path) -> str:
    """The whole script.

    Args:
        config: resolved and validated, ``launcher=slurm``.
        run_dir: its run directory, on a file system that all nodes share; it need not exist.
    """
    launcher, slurm = config.launcher, config.launcher.slurm
    lines = ["#!/bin/bash", f"# Written by `muster submit` for {run_dir}."]
    lines += [f"#SBATCH {option}" for option in _directives(config, run_dir)]
    # What the submitting machine runs, unless a line of launcher.slurm.setup puts something else before it.
    lines += ["", f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"', *slurm.setup]
    lines += ["", f"run_dir={shlex.quote(str(run_dir))}", *_START]
    arguments = ['"$run_dir"']
    command = 'exec muster resume "$@"'
    hosts = num_hosts(launcher)
    if hosts > 1:
        lines += _HEAD
        lines.append(_port(launcher))
        arguments += ['launcher.master_addr="$address"', 'launcher.master_port="$port"']
        command += ' launcher.node_rank="$SLURM_NODEID"'
    wait = int(config.resilience.stop_grace_seconds) + _LEAVE_SECONDS
    srun = [
        f"srun --nodes={hosts} --ntasks={hosts} --ntasks-per-node=1",
        # From 22.05 on, srun does not take this over from the job.
        f"--cpus-per-task={slurm.cpus_per_node}",
        # The first agent to leave with 75 must not be the others' death: they leave together.
        f"--kill-on-bad-exit=0 --wait={wait}",
        *(shlex.quote(option) for option in slurm.srun_args),
    ]
    started = f"bash -c '{command}' muster"
    lines.append(" \\\n    ".join([*srun, started, *arguments, '"$@"']))
    lines += ["code=$?", "", *(_REQUEUE if slurm.requeue else ['exit "$code"'])]
    return "\n".join(lines) + "\n"


def _directives(config: RunConfig, run_dir: Path) -> Iterator[str]:
    launcher, slurm = config.launcher, config.launcher.slurm
    yield f"--job-name={_word(f'{config.run.name}/{config.run.id}')}"
    yield f"--nodes={num_hosts(launcher)}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={slurm.cpus_per_node}"
    if slurm.gpus_per_node:
        kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
        yield f"--gpus-per-node={_word(kind)}{slurm.gpus_per_node}"
    for name in ("mem", "time", "partition", "account", "qos", "constraint"):
        value = getattr(slurm, name)
        if value is not None:
            yield f"--{name}={_word(value)}"
    yield "--requeue" if slurm.requeue else "--no-requeue"
    # To the job's steps, which are the agents; with B: it would reach this script alone.
    yield f"--signal=USR1@{slurm.signal_seconds}"
    log = str(run_dir).replace("%", "%%") + "/logs/slurm-%j.out"
    yield f"--output={_word(log)}"
    yield "--open-mode=append"
    yield f"--chdir={_word(str(Path.cwd()))}"
    yield from slurm.sbatch_args


def _word(text: str) -> str:
    """A value as sbatch reads it from a script: what a shell would split or cut stands in quotes."""
    if text and shlex.quote(text) == text:
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' if text else ""


_START = """\
newest() { ls -d "$run_dir"/checkpoints/step-*/manifest.json 2>/dev/null | tail -n 1; }
before=$(newest)
echo "$(date '+%F %T')  job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
""".splitlines()

# A node's address rather than its name, which need not be one that the network knows.
_HEAD = """\
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
""".splitlines()

_REQUEUE = f"""\
[ "$code" -eq {EXIT_STOPPED} ] || exit "$code"
# {EXIT_STOPPED}: saved because of the time limit. The job goes back to the queue, but not if it was cancelled or
# preempted, and not if this start has saved nothing new: then it would only do the same again.
case "$(scontrol --oneliner show job "$SLURM_JOB_ID")" in *' JobState=RUNNING '*) ;; *) exit "$code" ;; esac
if [ "$(newest)" = "$before" ]; then
    echo "No new checkpoint since this start: not queued again. A longer launcher.slurm.time, or a larger" \\
        "launcher.slurm.signal_seconds?"
    exit "$code"
fi
echo "Saved; back to the queue."
scontrol requeue "$SLURM_JOB_ID"
exit "$code"
""".splitlines()


def _port(launcher: LauncherConfig) -> str:
    """Two jobs may share their first node: the port follows from the job's number, unless it was chosen."""
    if launcher.master_port != LauncherConfig().master_port:
        return f"port={launcher.master_port}"
    return f"port=$(({launcher.master_port} + SLURM_JOB_ID % 1000))"


def require_sbatch() -> None:
    """Raise ConfigError where there is no sbatch."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "launcher",
            "slurm",
            "queues a job with the command sbatch, which this machine does not have",
            "submit from a login node of the cluster, or look at the script with --dry-run",
        )


def require_first(run: RunDirectory) -> None:
    """Raise ConfigError if a job of this run may still wait in the queue: its config must not change under it."""
    script = run.path / SCRIPT
    if script.exists():
        raise ConfigError(
            "run.id",
            run.path.name,
            "this run was submitted before",
            f"`sbatch {shlex.quote(str(script))}` to queue it again, or another id",
        )


def submit(run: RunDirectory, config: RunConfig) -> Outcome:
    """Write the script into the claimed and frozen run directory and queue it.

    Raises:
        ConfigError: sbatch refused the job; its own words are in the message.
    """
    script = run.path / SCRIPT
    write_atomically(script, batch_script(config, run.path))
    (run.path / "logs").mkdir(exist_ok=True)
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise ConfigError("launcher", "slurm", f"sbatch refused the job: {said}", "change what it names")
    job = done.stdout.strip().partition(";")[0]
    log = run.path / "logs" / f"slurm-{job}.out"
    return Outcome(
        0,
        f"Queued: job {job}, run {run.path}\n"
        f"  watch  squeue --job {job}; tail -F {shlex.quote(str(log))}\n"
        f"  stop   scancel {job}\n"
        f"  again  sbatch {shlex.quote(str(script))} [overrides]",
    )
