"""Can a save that is torn, or a checkpoint that is damaged, ever be loaded? Kills at every call, damage everywhere.

    make bench-torn [ARGS="--every 5 --flips 2000"]

1. A process is killed at every system call of its saves that changes a file (bench/torn_kills.py says which
   saves), before the call, after it, and after half of the bytes of a write. What a start finds then must be the
   newest checkpoint that both ranks knew to be committed, or one after it, with the right values; and a new process
   must be able to save from there.
2. Every file of the newest checkpoint is damaged: bits flipped (every byte of the manifest and of the shards'
   headers, drawn bytes of the data), truncated, holed, emptied, lengthened, replaced by another one. The one before
   must be used then, with the right values.

Writes bench/results/torn.md. Needs a C compiler (cc).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.torn_kills import save_all, wrong
from trainer.checkpoint.resume import newest_valid
from trainer.environment import cpu_model

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "torn.md"
HEADER_BYTES = 8
PAGE = 4096


def kills(folder: Path, every: int) -> dict[str, Any]:
    """Kill saves at every ``every``-th call; counts, and what was wrong ([]: nothing)."""
    library = folder / "torn_calls.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "torn_calls.c"), "-ldl"], check=True
    )
    done = subprocess.run(
        [sys.executable, "-m", "bench.torn_kills", str(folder), str(every), str(library)],
        env={
            **os.environ,
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(HERE.parent),
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def damages(
    content: bytes, other: bytes, header: int, num_flips: int, rng: random.Random
) -> Iterator[tuple[str, bytes]]:
    """(kind, damaged content) of a file of which the first ``header`` bytes are all flipped in turn."""
    size = len(content)
    data = [] if header >= size else [rng.randrange(header, size) for _ in range(num_flips)]
    drawn = [*range(min(header, size)), *data]
    for at in drawn:
        yield "bit flipped", content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    for length in {0, 1, 7, 8, size // 2, size - 1, *(rng.randrange(size) for _ in range(num_flips // 4))}:
        yield "truncated", content[:length]
    for at in range(0, size, PAGE):
        end = min(size, at + PAGE)
        yield "holed", content[:at] + bytes(end - at) + content[end:]
        yield "holed to the end", content[:at] + bytes(size - at)
    yield "lengthened", content + b"\n"
    yield "lengthened", content + content
    yield "another file's contents", other


def damage(folder: Path, num_flips: int) -> dict[str, Any]:
    """Damage every file of a checkpoint in every way; counts by file and kind, and what was wrong."""
    directory, rng = folder / "damaged", random.Random(0)
    save_all(directory, "one", ((1, 0),))
    keep = directory.with_name("one")
    (directory / "step-00000001").rename(keep)
    save_all(directory, "two", ((3, 0),))
    keep.rename(directory / "step-00000001")
    newest = directory / "step-00000003"
    counts: Counter[tuple[str, str]] = Counter()
    faults: list[str] = []
    for file in sorted(newest.iterdir()):
        content, other = file.read_bytes(), (directory / "step-00000001" / file.name).read_bytes()
        whole = file.suffix == ".json"
        header = len(content) if whole else HEADER_BYTES + int.from_bytes(content[:HEADER_BYTES], "little")
        for kind, bad in damages(content, other, header, num_flips, rng):
            if bad == content:
                continue
            file.write_bytes(bad)
            found = newest_valid(directory, lambda path, reason: None)
            counts[file.name, kind] += 1
            if found is None or found.step != 1 or (says := wrong(found)) is not None:
                faults.append(f"{file.name}, {kind}: {'nothing' if found is None else (found.step, says)}")
        file.unlink()
        found = newest_valid(directory, lambda path, reason: None)
        counts[file.name, "removed"] += 1
        if found is None or found.step != 1:
            faults.append(f"{file.name}, removed: was loaded")
        file.write_bytes(content)
    found = newest_valid(directory, lambda path, reason: None)
    assert found is not None and found.step == 3 and wrong(found) is None, "undamaged it must load"
    return {
        "counts": {f"{name}: {kind}": number for (name, kind), number in counts.items()},
        "faults": faults,
    }


def page(command: str, killed: dict[str, Any], damaged: dict[str, Any], seconds: float) -> str:
    """bench/results/torn.md."""
    faults = [*killed["faults"], *damaged["faults"]]
    wrong_loads = sum("wrong" in fault or "damaged" in fault for fault in killed["faults"]) + len(
        damaged["faults"]
    )
    lost = sum("lost" in fault for fault in killed["faults"])
    lines = [
        "# Torn saves and damaged checkpoints",
        "",
        f"{time.strftime('%Y-%m-%d')}, {cpu_model()}, {os.cpu_count()} shared cores, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {seconds:.0f} s:",
        "",
        f"```bash\n{command}\n```",
        "",
        f"**{wrong_loads} wrong loads, {lost} lost committed checkpoints.**",
        "",
        "The saves: step 2 (named the best), step 2 again with other contents, step 3; two ranks; older steps go.",
        f"Together about {killed['calls']} system calls that change files. A process killed by SIGKILL at call N:",
        "",
        "| dies | kills |",
        "| --- | --- |",
        *(f"| {way} | {number:,} |" for way, number in killed["kills"].items()),
        "",
        "What must hold after each: a start finds the newest checkpoint that both ranks knew to be committed, or a",
        "newer one, with the right values, and nothing damaged under a final name; the next process saves and",
        "cleans up. This is about processes that die, not about power: what the kernel took was kept. All calls",
        "that `strace` shows for these saves are counted.",
        "",
        "| damaged | times |",
        "| --- | --- |",
        *(f"| {name} | {number:,} |" for name, number in damaged["counts"].items()),
        "",
        "What must hold after each: the checkpoint before is used, with the right values.",
        *(["", "## Faults", "", *(f"* {fault}" for fault in faults)] if faults else []),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="kill at every N-th call only")
    parser.add_argument("--flips", type=int, default=2000, help="flipped bits in the data of each shard")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        killed = kills(Path(name), given.every)
        damaged = damage(Path(name), given.flips)
    command = f'make bench-torn ARGS="--every {given.every} --flips {given.flips}"'
    RESULTS.write_text(page(command, killed, damaged, time.monotonic() - began))
    print(RESULTS.read_text())
    sys.exit(1 if killed["faults"] or damaged["faults"] else 0)


if __name__ == "__main__":
    main()
