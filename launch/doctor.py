"""``muster doctor``: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.markers import default_environment
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.outcome import Outcome
from parallel.errors import ConfigError
from trainer.checkpoint.lease import kept, memory_base
from trainer.environment import SOURCE, count_gpus, cpu_model, package_version

_GIB = 1 << 30
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


@dataclass(frozen=True)
class Finding:
    """One line of the table. ``state``: ok, note (works, could be better) or bad (training cannot work)."""

    section: str
    name: str
    value: str
    state: str = "ok"
    advice: str = ""


def main(argv: list[str]) -> Outcome:
    """Print the table; exit code 0 unless something essential is broken, then 1."""
    if argv:
        raise ConfigError("doctor", " ".join(argv), "takes no arguments", "muster doctor")
    console = Console(highlight=False)
    with console.status("Looking around…"):
        findings = list(examine())
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    section = ""
    for found in findings:
        mark = {"ok": Text("✓", "green"), "note": Text("!", "yellow"), "bad": Text("✗", "red")}[found.state]
        value = Text(found.value)
        if found.advice:
            value.append(f"  {found.advice}", style="yellow" if found.state == "note" else "red")
        table.add_row(
            found.section if found.section != section else "", Text.assemble(mark, " ", found.name), value
        )
        section = found.section
    console.print(table)
    bad = [found.name for found in findings if found.state == "bad"]
    return Outcome(1, f"Essential and broken: {', '.join(bad)}.") if bad else Outcome(0, "Ready to train.")


def examine() -> Iterator[Finding]:
    """Everything the doctor looks at, in order."""
    yield from _machine()
    yield from _torch()
    yield from _storage()
    yield from _packages()
    yield from _wandb()


def _machine() -> Iterator[Finding]:
    yield Finding("machine", "system", platform.platform())
    fine = sys.version_info >= (3, 11)
    yield Finding(
        "machine",
        "python",
        platform.python_version(),
        "ok" if fine else "bad",
        "" if fine else "Python 3.11 or newer",
    )
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count()
    features = (
        ", ".join(name for name in _FEATURES if name in _cpu_flags()) or "no vector extensions known here"
    )
    yield Finding("machine", "cpu", f"{cpu_model()}, {usable} of {total} cores usable, {features}")
    memory = psutil.virtual_memory()
    yield Finding(
        "machine", "memory", f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} GiB free"
    )


def _torch() -> Iterator[Finding]:
    try:
        import torch
        import torch.distributed as dist
    except Exception as error:
        yield Finding(
            "torch",
            "torch",
            f"does not import: {error}",
            "bad",
            "pip install torch (pytorch.org names the build)",
        )
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    yield Finding("torch", "torch", f"{torch.__version__} ({build})")
    if not dist.is_available() or not dist.is_gloo_available():
        yield Finding("torch", "gloo", "missing", "bad", "install an official torch build")
    else:
        yield Finding("torch", "gloo", "available")
    num_gpus = count_gpus()
    if num_gpus:
        for index in range(num_gpus):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(
                "torch", f"gpu {index}", f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB"
            )
        nccl = dist.is_nccl_available()
        yield Finding(
            "torch",
            "nccl",
            "available" if nccl else "missing",
            "ok" if nccl else "bad",
            "" if nccl else "a CUDA build",
        )
    elif any(Path("/dev").glob("nvidia[0-9]*")):
        yield Finding(
            "torch", "gpu", "present, not usable", "note", "install a CUDA build of torch, check nvidia-smi"
        )
    else:
        yield Finding("torch", "gpu", "none: training runs on the CPU")
    from trainer.hardware import measured_matmul_flops

    rate = measured_matmul_flops(torch.device("cpu"), torch.float32) / 1e9
    yield Finding(
        "torch", "matmul", f"{rate:,.0f} GFLOP/s measured (fp32, CPU, {torch.get_num_threads()} threads)"
    )

    yield from _kernels(num_gpus)


def _kernels(num_gpus: int) -> Iterator[Finding]:
    """What the experts go through, and whether ``train.compile`` can."""
    import torch

    from trainer.build import cpp_compiler
    from trainer.moe.by_expert import multiplied_in

    if multiplied_in(torch.bfloat16) is torch.bfloat16:
        bf16 = "bf16 in bf16, for which the processor has instructions"
    else:
        bf16 = "bf16 in fp32, an expert at a time: the processor has no instructions for it"
    yield Finding("torch", "experts, cpu", f"a thread a run of rows; fp32 in fp32, {bf16}")
    if num_gpus:
        yield Finding(
            "torch", "experts, gpu", "torch.nn.functional.grouped_mm; a loop in fp64 and odd widths"
        )
    compiler = cpp_compiler()
    missing = "install g++ for train.compile=true"
    yield Finding(
        "torch", "compiler", compiler or "none", "ok" if compiler else "note", "" if compiler else missing
    )


def _storage() -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / _GIB
        small = size < 1
        yield Finding(
            "storage",
            "/dev/shm",
            f"{size:.2f} GiB",
            "note" if small else "ok",
            "small: give a container --shm-size=8g" if small else "",
        )
        yield from _snapshots(memory_base(None))
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    writable = os.access(Path.cwd(), os.W_OK)
    yield Finding(
        "storage",
        "this folder",
        f"{free:.1f} GiB free{'' if writable else ', not writable'}",
        "ok" if writable and free > 2 else "note",
        "" if writable and free > 2 else "run.root=DIRECTORY with room for checkpoints",
    )


def _snapshots(base: Path) -> Iterator[Finding]:
    """Memory that runs hold for their restart, one line each."""
    for folder in sorted(base.iterdir()) if base.is_dir() else ():
        found = kept(folder)
        if found is None:
            continue
        value = f"{found}, of {found.run_dir or 'a run that begins'}"
        if found.held:
            yield Finding("storage", "snapshots", f"{value}, which is at work")
        else:
            advice = f"for its restart; the next start of another run frees it, or: rm -r {folder}"
            yield Finding("storage", "snapshots", value, "note", advice)


def _packages() -> Iterator[Finding]:
    tested = _tested_versions()
    try:
        lines = metadata.requires("muster-moe") or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", "muster-moe", "not installed", "bad", "pip install -e .")
        return
    environment = {**default_environment(), "extra": ""}
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate(environment):  # type: ignore[arg-type]
            continue
        version = package_version(requirement.name)
        if version is None:
            yield Finding("packages", requirement.name, "missing", "bad", f"pip install '{requirement}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding("packages", requirement.name, version, "bad", f"pip install '{requirement}'")
        else:
            other = tested.get(requirement.name, version)
            same = other == version.partition("+")[0] or other == version
            yield Finding(
                "packages",
                requirement.name,
                version,
                "ok" if same else "note",
                "" if same else f"tested with {other}",
            )


def _tested_versions() -> dict[str, str]:
    """The pins of constraints.txt, which a checkout has and a wheel has not."""
    path = SOURCE / "constraints.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    pins = (line.partition("#")[0].strip().partition("==") for line in lines)
    return {name.strip(): version.strip() for name, equals, version in pins if equals}


def _wandb() -> Iterator[Finding]:
    netrc = Path.home() / ".netrc"
    key = bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "api.wandb.ai" in netrc.read_text())
    text = (
        "a key is set" if key else "no key: runs are kept offline, `wandb login` and `wandb sync` upload them"
    )
    yield Finding("w&b", "account", text)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
