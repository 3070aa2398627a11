"""Every block of docs/launching.md, run as it stands on hosts of those names, with a smaller model."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.chaos.hosts import Host
from tests.cluster.conftest import RUN
from tests.cluster.hosts import need
from tests.command import REPO, SMALL, Workplace
from tests.commands.watch import assert_nothing_left, path_with_muster

PAGE = REPO / "docs" / "launching.md"
BLOCK = re.compile(r"<!-- run on (?P<hosts>[a-z -]+) -->\n```bash\n(?P<text>.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block: the hosts that run it, at once, and its text."""

    hosts: tuple[str, ...]
    text: str

    @property
    def run_id(self) -> str:
        found = re.search(r"(?:run\.id=|--rdzv-id=)([\w-]+)", self.text)
        assert found, f"this block names no run:\n{self.text}"
        return found[1]


BLOCKS = [
    Block(tuple(found["hosts"].split(" and ")), found["text"]) for found in BLOCK.finditer(PAGE.read_text())
]
TRIED_ELSEWHERE = ("by-hand", "over-ssh", "under-torchrun", "under-accelerate")
"""In other words, by test_two_nodes.py, test_torchrun.py and test_accelerate.py."""
TRAINING = [block for block in BLOCKS if "muster submit" not in block.text and "srun" not in block.text]


def test_every_block_is_run() -> None:
    """By this module, or by the one for Slurm and Kubernetes."""
    text = PAGE.read_text()
    assert len(BLOCKS) == text.count("```bash") >= 6, "a block has no `run on` line"


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, marks=pytest.mark.long if block.run_id in TRIED_ELSEWHERE else ())
        for block in TRAINING
    ],
    ids=lambda block: block.run_id,
)
def test_block(
    block: Block, workplace: Workplace, nodes: list[Host], ssh_config: Path, calm: Workplace
) -> None:
    if "deepspeed --hostfile" in block.text:
        need("pdsh")
    small = [override for override in SMALL if not override.startswith(("run.", "device="))]
    small += [f"data.path={workplace.path / 'corpus'}", "run.name=e2e", *RUN]
    if block.hosts == ("node-a",) and "hosts" not in block.text:
        small.append("launcher.nproc_per_node=2")
    text = block.text.replace("experiment=quickstart", shlex.join(small))
    text = text.replace("/shared/runs", str(workplace.path / "runs"))
    workplace.env["PATH"] = path_with_muster()
    started = []
    for rank, host in enumerate(host for host in nodes if host.name in block.hosts):
        with_rank = f"export NODE_RANK={rank}\nset -e\n{text}"
        started.append(workplace.start(*host.command("bash", "-c", with_rank)))
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)
    run_dir = workplace.path / "runs" / "e2e" / block.run_id
    assert workplace.losses(run_dir) == pytest.approx(calm.losses(), rel=1e-5)
    if "engine=" not in block.text:
        assert workplace.digest(run_dir) == calm.digest(), (
            "the native engine computes the same bits everywhere"
        )
    _assert_ended(workplace, nodes)


def _assert_ended(workplace: Workplace, nodes: list[Host]) -> None:
    assert_nothing_left(workplace)
    for host in nodes:
        found = subprocess.run(host.command("pgrep", "-af", "-m trainer"), capture_output=True, text=True)
        own = [line for line in found.stdout.splitlines() if str(workplace.path) in line]
        assert not own, own
