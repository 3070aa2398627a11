"""What a run depends on beside its config: versions, hardware, code. Written as ``environment.json``."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import runpy
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from parallel.errors import ConfigError
from trainer.config import RunConfig

PACKAGES = (
    *("torch", "numpy", "hydra-core", "omegaconf", "datasets", "pyarrow", "tokenizers"),
    *("safetensors", "xxhash", "wandb", "rich", "matplotlib"),
)
SOURCE = Path(__file__).resolve().parent.parent


def count_gpus() -> int:
    """Usable CUDA devices; torch is only imported on a machine that has some."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return 0
    import torch

    return torch.cuda.device_count()


def package_version(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(config: RunConfig, command: list[str]) -> dict[str, Any]:
    """The environment of a run that starts now."""
    devices = []
    if num_gpus := count_gpus():
        import torch

        devices = [torch.cuda.get_device_name(index) for index in range(num_gpus)]
    return {
        "time": time.time(),
        "command": command,
        "directory": str(Path.cwd()),
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "muster": package_version("muster-moe"),
        "packages": {name: package_version(name) for name in PACKAGES},
        "cuda": _cuda_of_torch(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "device": config.device.value,
        "devices": devices,
        "threads": config.train.num_threads,
        "processes": config.launcher.nproc_per_node,
        "git": git_state(SOURCE),
    }


def _cuda_of_torch() -> str | None:
    """The CUDA version that torch was built for, None of a CPU build; importing torch would take seconds."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    version: str | None = runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"]
    return version


_CODE = ("launch", "trainer", "parallel", "conf")
_SHARED_PACKAGES = (
    *("torch", "numpy", "datasets", "tokenizers", "safetensors", "xxhash", "deepspeed", "accelerate"),
)


@functools.cache
def code_digest() -> str:
    """Of every source and config file that decides what a run computes."""
    digest = hashlib.sha256()
    for folder in _CODE:
        for path in sorted((SOURCE / folder).rglob("*")):
            if path.suffix in (".py", ".yaml") and path.is_file():
                digest.update(f"{path.relative_to(SOURCE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def fingerprint() -> dict[str, str]:
    """What must be the same on every node of a run; ``host`` is for naming the one that differs."""
    found = {name: package_version(name) or "missing" for name in _SHARED_PACKAGES}
    git = git_state(SOURCE)
    revision = "" if git is None else f" ({git['revision'][:10]}{', changed' if git['dirty'] else ''})"
    code = f"{code_digest()}{revision}"
    return {"host": socket.gethostname(), "python": platform.python_version(), **found, "muster code": code}


def check_alike(prints: list[dict[str, str]]) -> None:
    """Compare nodes with the first.

    Raises:
        ConfigError: one differs; the message names its host and every difference.
    """
    first = prints[0]
    for other in prints[1:]:
        keys = [key for key in first if key != "host" and first[key] != other.get(key)]
        if keys:
            told = "; ".join(
                f"{key} is {other.get(key)} on {other['host']} and {first[key]} on {first['host']}"
                for key in keys
            )
            raise ConfigError(
                "launcher.nnodes",
                len(prints),
                f"the nodes differ: {told}",
                f"install the same on {other['host']}",
            )


def git_state(folder: Path) -> dict[str, Any] | None:
    """Revision of the checkout that the code runs from, and whether it was changed; None outside of git."""
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return {"revision": head, "dirty": bool(_git(folder, "status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What bit-identity depends on and has changed: ``torch 2.11.0 → 2.13.0``."""
    old, new = _decisive(before), _decisive(now)
    return [f"{key} {old[key]} → {value}" for key, value in new.items() if key in old and old[key] != value]


def _decisive(environment: dict[str, Any]) -> dict[str, Any]:
    kept = ("python", "cpu", "device", "devices", "threads", "processes", "cuda")
    chosen = {key: environment[key] for key in kept if key in environment}
    return {**chosen, **environment.get("packages", {})}
