"""What a run depends on beside its config: versions, hardware, code. Written as ``environment.json``."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

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
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(count_gpus())]
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
        "cuda": torch.version.cuda,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "device": config.device.value,
        "devices": devices,
        "threads": config.train.num_threads,
        "processes": config.launcher.nproc_per_node,
        "git": git_state(SOURCE),
    }


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
