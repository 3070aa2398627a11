"""How long does a fault cost, and what do saves cost? Muster and its peers on the same work, in one run.

    make bench-survival [ARGS="--launches 3 --faults 2"]

Every contender trains the same dense model on the same batches with two ranks on this machine. A rank is hit
with SIGKILL or SIGSTOP at a random moment. *Recovery* is the time from the signal until a process that stands for
the hit rank has done one step more than anyone had done before the signal: the job is whole again and has lost
nothing. Contenders take turns, so that what else happens on the machine hits all alike. Writes
bench/results/survival.md and the raw samples to survival.json.

The peers are installed into a virtual environment of their own (extra ``bench``): torchft, nvidia-resiliency-ext.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.here import RESULTS
from bench.recovery.progress import read
from trainer.environment import cpu_model

REPO = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

WARM_STEPS = 25
PATIENCE_SECONDS = 150.0
MODEL = [
    *("device=cpu", "model=tiny", "layout=dense", "model.dim=128", "model.ffn_dim=256", "data=stdlib"),
    *("data.tokenizer.vocab_size=2048", "train.seq_len=128", "train.global_batch=4", "train.num_threads=1"),
    *("train.steps=100000", "optim.schedule=constant", "optim.warmup_steps=0", "optim.lr=1e-3"),
    *("launcher.nproc_per_node=2", "logger.wandb.mode=disabled", "logger.terminal=off", "run.name=bench"),
]
MUSTER = ["checkpoint.memory_every=1", "checkpoint.every=200", "resilience.heartbeat_seconds=3"]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Job:
    """One launch of a contender: its processes and the folder with its ranks' notes."""

    folder: Path
    processes: list[subprocess.Popen[bytes]]

    def end(self) -> None:
        """Kill everything of it, stopped processes too."""
        found = []
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                found += [*parent.children(recursive=True), parent]
        for rank in (0, 1):
            for line in read(self.folder, rank)[-1:]:
                with suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(line["pid"]))
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self.processes:
            process.wait()


def spawn(folder: Path, command: list[str], **env: str) -> subprocess.Popen[bytes]:
    """Start a command of a contender; what it prints goes to a file in the folder."""
    log = (folder / f"{len(list(folder.glob('*.log')))}.log").open("wb")
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPO), "MUSTER_CACHE": str(folder.parent / "cache"), **env},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def start_muster(folder: Path, config: Path) -> list[subprocess.Popen[bytes]]:
    """`muster train`, a snapshot of every step in memory."""
    callback = f"callbacks=[{{target: 'bench.recovery.progress:Progress', kwargs: {{folder: '{folder}'}}}}]"
    return [spawn(folder, [str(BIN / "muster"), "train", *MODEL, *MUSTER, callback, "run.id=a"])]


def _plain(folder: Path, config: Path, *more: str) -> list[str]:
    return ["-m", "bench.recovery.plain", "--config", str(config), "--folder", str(folder), *more]


def start_torchrun(folder: Path, config: Path) -> list[subprocess.Popen[bytes]]:
    """DDP under torchrun, DCP asynchronous checkpoints every 10 steps, collectives time out after 3 s.

    With a rendezvous store of its own, without which two of three restarts fail on gloo.
    """
    command = [str(BIN / "torchrun"), "--nproc-per-node=2", "--max-restarts=9", "--monitor-interval=0.1"]
    command += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-backend=c10d"]
    return [spawn(folder, command + _plain(folder, config), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")]


def start_nvrx(folder: Path, config: Path) -> list[subprocess.Popen[bytes]]:
    """The same under NVRx's ft_launcher with a heartbeat timeout of 3 s."""
    command = [str(BIN / "ft_launcher"), "--nproc-per-node=2", "--max-restarts=9", "--monitor-interval=0.1"]
    command += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-backend=c10d"]
    command += ["--ft-param-rank_heartbeat_timeout=3", "--ft-param-initial_rank_heartbeat_timeout=60"]
    command += ["--ft-param-workload_check_interval=0.5"]
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return [spawn(folder, command + _plain(folder, config, "--nvrx"), **environment)]


def start_torchft(folder: Path, config: Path) -> list[subprocess.Popen[bytes]]:
    """Two replica groups of torchft, each under a torchrun, and its lighthouse; time-outs of 3 s."""
    port = free_port()
    lighthouse = [str(BIN / "torchft_lighthouse"), "--min_replicas=1", "--join_timeout_ms=1000"]
    lighthouse += ["--quorum_tick_ms=50", "--heartbeat_timeout_ms=3000", f"--bind=127.0.0.1:{port}"]
    processes = [spawn(folder, lighthouse)]
    for replica in (0, 1):
        command = [str(BIN / "torchrun"), "--nproc-per-node=1", "--max-restarts=9", "--monitor-interval=0.1"]
        command += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-backend=c10d"]
        command += ["-m", "bench.recovery.replicas", "--config", str(config), "--folder", str(folder)]
        environment = {"REPLICA": str(replica), "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        processes.append(spawn(folder, command, **environment))
    return processes


CONTENDERS: dict[str, Callable[[Path, Path], list[subprocess.Popen[bytes]]]] = {
    "Muster": start_muster,
    "torchrun + DCP": start_torchrun,
    "NVRx ft_launcher + DCP": start_nvrx,
    "torchft": start_torchft,
}
FAULTS = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """What the condition finds; None when it took too long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.01)
    return None


def reached(folder: Path, rank: int) -> int:
    """Most steps that this rank has noted."""
    return max((line["step"] for line in read(folder, rank)), default=0)


def hit(job: Job, name: str, dice: random.Random) -> dict[str, Any]:
    """One fault on rank 1 and how it was got over; all seconds count from the signal, None: never seen."""
    time.sleep(dice.uniform(0.0, 1.0))
    victim = read(job.folder, 1)[-1]["pid"]
    before = max(reached(job.folder, rank) for rank in (0, 1))
    began = time.time()
    os.kill(victim, FAULTS[name])

    def whole_again() -> float | None:
        return next(
            (
                line["time"] - began
                for line in read(job.folder, 1)
                if line["time"] > began and line["pid"] != victim and line["step"] > before
            ),
            None,
        )

    seconds = wait_for(whole_again, PATIENCE_SECONDS)
    others = (line["time"] - began for line in read(job.folder, 0) if line["time"] > began)
    onward = [
        line["time"] - began for line in read(job.folder, 0) if line["time"] > began and line["step"] > before
    ]
    return {
        "fault": name,
        "step": before,
        "recovery_seconds": seconds,
        "others_onward_seconds": min(onward, default=None),
        "first_sign_seconds": min(others, default=None),
    }


def launch(name: str, root: Path, config: Path) -> Job | str:
    """Start a contender and let it get warm; why not, if it does not."""
    folder = Path(tempfile.mkdtemp(dir=root))
    job = Job(folder, CONTENDERS[name](folder, config))
    if wait_for(lambda: min(reached(folder, 0), reached(folder, 1)) >= WARM_STEPS, PATIENCE_SECONDS):
        return job
    job.end()
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("*.log")))
    return f"did not reach step {WARM_STEPS} in {PATIENCE_SECONDS:g} s:\n{logs}"


def median(samples: list[dict[str, Any]], field: str) -> str:
    """The median of a field as text, with how many of the samples have it and their range."""
    values = sorted(sample[field] for sample in samples if sample[field] is not None)
    if not values:
        return f"never (0 of {len(samples)})" if samples else "—"
    spread = f"{values[0]:.1f}–{values[-1]:.1f}, {len(values)} of {len(samples)}"
    return f"**{statistics.median(values):.1f}** ({spread})"


def render(samples: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The page of the results."""
    lines = [
        "# Recovery from a fault, Muster and peers in one run",
        "",
        f"{about['machine']}, {about['date']}, load {about['load'][0]:.1f} at the start and "
        f"{about['load'][1]:.1f} at the end. Command: `{about['command']}`. Raw samples: survival.json.",
        "",
        "Seconds from the signal until the hit rank's successor has done one step more than anyone had before:"
        " median (range, how many recovered).",
        "",
        "| | " + " | ".join(FAULTS) + " |",
        "| --- |" + " --- |" * len(FAULTS),
    ]
    for name in CONTENDERS:
        cells = [
            median([s for s in samples if (s["contender"], s["fault"]) == (name, fault)], "recovery_seconds")
            for fault in FAULTS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name in CONTENDERS:
        lines += ["", f"*{name}*: {' '.join((CONTENDERS[name].__doc__ or '').split())}"]
    lines += [
        "",
        "A survivor of torchft goes on alone meanwhile; seconds until it has done its next step:",
        "",
    ]
    for fault in FAULTS:
        own = [s for s in samples if (s["contender"], s["fault"]) == ("torchft", fault)]
        lines.append(f"* {fault}: {median(own, 'others_onward_seconds')}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Take the samples and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--launches", type=int, default=3, help="of every contender")
    parser.add_argument("--faults", type=int, default=2, help="of each kind a launch")
    parser.add_argument("--only", default="", help="contenders, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chosen = [name for name in CONTENDERS if not args.only or name in args.only.split(",")]
    root = Path(tempfile.mkdtemp(prefix="muster-survival-"))
    samples: list[dict[str, Any]] = []
    load, dice = [os.getloadavg()[0]], random.Random(args.seed)
    try:
        config = freeze(root)
        for number in range(args.launches):
            for name in chosen:
                job = launch(name, root, config)
                if isinstance(job, str):
                    sys.exit(f"{name} {job}")
                try:
                    for fault in list(FAULTS) * args.faults:
                        sample = {"contender": name, "launch": number, **hit(job, fault, dice)}
                        samples.append(sample)
                        print(json.dumps(sample), flush=True)
                        if sample["recovery_seconds"] is None:
                            job.end()
                            again = launch(name, root, config)
                            if isinstance(again, str):
                                sys.exit(f"{name} {again}")
                            job = again
                finally:
                    job.end()
                    shutil.rmtree(job.folder)
    finally:
        shutil.rmtree(root)
    about = {
        "machine": f"{os.cpu_count()} cores of {cpu_model()}, {platform.system()}",
        "date": time.strftime("%Y-%m-%d"),
        "load": [*load, os.getloadavg()[0]],
        "command": f"make bench-survival ARGS='{' '.join(sys.argv[1:])}'",
    }
    page = render(samples, about)
    print(page)
    if not args.only:
        (RESULTS / "survival.json").write_text(json.dumps({**about, "samples": samples}, indent=1) + "\n")
        (RESULTS / "survival.md").write_text(page)


def freeze(root: Path, *overrides: str) -> Path:
    """A frozen config of the work, with the data ready: what the peers start from."""
    more = [*overrides, "train.steps=1", "checkpoint.every=0", "run.id=frozen"]
    command = [str(BIN / "muster"), "train", *MODEL, *more]
    done = subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(REPO), "MUSTER_CACHE": str(root / "cache")},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
    frozen = root / "runs" / "bench" / "frozen" / "config.yaml"
    path = root / "config.yaml"
    path.write_text(frozen.read_text().replace("steps: 1\n", "steps: 100000\n"))
    return path


if __name__ == "__main__":
    main()
