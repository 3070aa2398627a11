"""`muster submit launcher=slurm` and `srun python -m trainer` on a real Slurm: two nodes, one process each.

A node that fails, a time limit, a cancelled job: each ends with what was saved, and goes on with the same bits.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import RUN
from tests.cluster.slurm import PARTITIONS, Slurm, require_slurm, wait_until
from tests.command import MUSTER, REPO, SMALL, Workplace
from tests.commands.plugins import entry
from tests.commands.watch import assert_nothing_left, checkpoints_of, path_with_muster

HOLD_AT = 6
BLOCK = re.compile(r"<!-- run on slurm -->\n```bash\n(.*?)```", re.DOTALL)
BLOCKS = [
    text for page in sorted((REPO / "docs").glob("launching*.md")) for text in BLOCK.findall(page.read_text())
]
"""What the page on launching says of Slurm."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """A cluster of five nodes."""
    require_slurm()
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own is too long for a socket's path
    try:
        with Slurm(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Job:
    """A submitted run, in a folder of its own whose path has a space and what sbatch takes for a pattern."""

    def __init__(self, slurm: Slurm, folder: Path, partition: str, *overrides: str) -> None:
        folder.mkdir(exist_ok=True)
        self.slurm, self.place = slurm, Workplace(folder, {"SLURM_CONF": slurm.env()["SLURM_CONF"]})
        self.mark = folder / "held"
        self.run_dir = folder / "all runs %j" / "e2e" / "a"
        asked = [
            "launcher=slurm",
            "launcher.nnodes=2",
            "launcher.slurm.cpus_per_node=1",
            f"launcher.slurm.partition={partition}",
            "resilience.stop_grace_seconds=15",
            "launcher.slurm.signal_seconds=20",
            f"run.root={self.run_dir.parent.parent}",
            f"data.path={folder / 'corpus'}",
        ]
        output = self.place.run(MUSTER, "submit", *SMALL, *RUN, *asked, *overrides)
        found = re.search(r"Queued: job (\d+), run (.+)", output)
        assert found is not None and found[2] == str(self.run_dir), output
        self.id = found[1]

    def wait_held(self) -> None:
        """Until rank 0 waits in its step."""

        def held() -> bool:
            assert self.slurm.state(self.id) in ("PENDING", "RUNNING"), self.log()
            return self.mark.exists()

        wait_until(held, self.log)

    def wait(self, state: str) -> None:
        """Until the job has ended in this state."""
        self.slurm.wait_for_state(self.id, "COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        assert self.slurm.state(self.id) == state, self.log() + self.slurm.logs()
        assert_nothing_left(self.place)

    def log(self) -> str:
        """What the job has printed, over all its starts."""
        return (self.run_dir / "logs" / f"slurm-{self.id}.out").read_text()

    def restarts(self) -> int:
        """How often Slurm has queued it again."""
        return int(self.slurm.job(self.id)["Restarts"])


def hold(job_folder: Path, **options: object) -> str:
    """An override: rank 0 waits in a step of the first start, and says so with a file."""
    options = {"step": HOLD_AT, "mark": str(job_folder / "held"), **options}
    return f"callbacks=[{entry('tests.cluster.plugins:Hold', **options)}]"


def assert_as_calm(job: Job, calm: Workplace) -> None:
    assert calm.digest() == job.place.digest(job.run_dir), job.log()
    assert calm.losses() == job.place.losses(job.run_dir)


@pytest.fixture(scope="module")
def limited(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that reaches its time limit. It waits for Slurm's signal while other tests are at work."""
    folder = tmp_path_factory.mktemp("limited")
    # The limit comes to be one to two minutes away, and Slurm signals up to 30 s early: at its next look.
    asked = ["launcher.slurm.time=0:10:00", "launcher.slurm.signal_seconds=100"]
    return Job(slurm, folder, "b", *asked, hold(folder, limited=True))


@pytest.mark.long
def test_a_node_fails_and_the_job_goes_on_with_another(
    slurm: Slurm, limited: Job, calm: Workplace, tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path, "a", hold(tmp_path))
    job.wait_held()
    first = slurm.nodes_of(job.id)
    slurm.crash(first[1])
    job.wait("COMPLETED")
    assert job.restarts() == 1
    assert set(slurm.nodes_of(job.id)) == {*PARTITIONS["a"]} - {first[1]}
    assert [event["step"] for event in job.place.events("resume", job.run_dir)] == [4]
    assert "start 1, on" in job.log() and "start 2, on" in job.log()
    assert_as_calm(job, calm)
    slurm.mend(first[1])


@pytest.mark.long
def test_scancel_saves_and_does_not_queue_again(slurm: Slurm, calm: Workplace, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "a", hold(tmp_path))
    job.wait_held()
    slurm.run("scancel", job.id)
    job.wait("CANCELLED")
    assert checkpoints_of(job.run_dir)[-1] == f"step-{HOLD_AT + 1:08d}"
    assert job.restarts() == 0 and "back to the queue" not in job.log()
    # The same script again, with an override, when the user wants it to go on.
    script = str(job.run_dir / "job.sbatch")
    job.id = job.place.run("sbatch", "--parsable", script, "logger.wandb.project=again").strip()
    job.wait("COMPLETED")
    assert [event["step"] for event in job.place.events("resume", job.run_dir)] == [HOLD_AT + 1]
    assert "project: again" in (job.run_dir / "config.yaml").read_text()
    assert_as_calm(job, calm)


def test_what_cannot_work_fails_with_its_own_code(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "a", "data.path=nowhere.txt")
    job.wait("FAILED")
    assert slurm.job(job.id)["ExitCode"] == "2:0", job.log()
    assert job.restarts() == 0 and "nowhere.txt" in job.log()


def run_block(slurm: Slurm, folder: Path, text: str) -> tuple[Workplace, str]:
    """Run a block of the page as it stands, with a smaller model; what it printed."""
    place = Workplace(folder, {"SLURM_CONF": slurm.env()["SLURM_CONF"], "PATH": path_with_muster()})
    small = [override for override in SMALL if not override.startswith(("run.id=", "device="))]
    small += [f"data.path={folder / 'corpus'}", "resilience.stop_grace_seconds=15"]
    if "--dry-run" not in text:
        small += RUN
    text = text.replace("experiment=quickstart", shlex.join(small)).replace(
        "/shared/runs", str(folder / "runs")
    )
    return place, place.run("bash", "-e", "-c", text)


def test_the_page_has_a_block_for_each_way() -> None:
    assert len([text for text in BLOCKS if "--dry-run" in text]) == 2
    assert len([text for text in BLOCKS if "srun" in text]) == 1
    assert len(BLOCKS) == 4


@pytest.mark.parametrize("text", [text for text in BLOCKS if "--dry-run" in text], ids=["gpus", "lists"])
def test_dry_run_blocks_of_the_page(slurm: Slurm, tmp_path: Path, text: str) -> None:
    place, output = run_block(slurm, tmp_path, text)
    assert output.startswith("#!/bin/bash\n#")
    assert not (place.path / "runs").exists()


def test_the_submit_block_of_the_page(slurm: Slurm, calm: Workplace, tmp_path: Path) -> None:
    (text,) = [text for text in BLOCKS if "muster submit" in text and "--dry-run" not in text]
    place, output = run_block(slurm, tmp_path, text)
    found = re.search(r"Queued: job (\d+), run (.+)", output)
    assert found is not None, output
    slurm.wait_for_state(found[1], "COMPLETED", "FAILED")
    run_dir = tmp_path / "runs" / "e2e" / "under-slurm"
    log = run_dir / "logs" / f"slurm-{found[1]}.out"
    assert slurm.state(found[1]) == "COMPLETED", log.read_text()
    assert str(log) in output and str(run_dir) == found[2]
    assert place.digest(run_dir) == calm.digest()
    assert_nothing_left(place)


def test_srun_starts_workers_without_an_agent(slurm: Slurm, calm: Workplace, tmp_path: Path) -> None:
    (text,) = [text for text in BLOCKS if "srun" in text]
    place, _ = run_block(slurm, tmp_path, text)
    (run_dir,) = (tmp_path / "runs" / "e2e").iterdir()
    assert run_dir.name.isdigit(), "the job's number names the run"
    assert place.events("start", run_dir)[0]["world_size"] == 2
    assert place.digest(run_dir) == calm.digest()
    assert_nothing_left(place)


@pytest.mark.long
def test_ahead_of_the_time_limit_the_run_is_saved_and_queued_again(
    slurm: Slurm, limited: Job, calm: Workplace
) -> None:
    limited.wait("COMPLETED")
    assert limited.restarts() == 1
    assert "SIGUSR1" in limited.log() and "Saved; back to the queue." in limited.log()
    assert [event["step"] for event in limited.place.events("resume", limited.run_dir)] == [HOLD_AT + 1]
    assert_as_calm(limited, calm)


def test_sbatch_says_no_and_nothing_is_left_behind(slurm: Slurm, tmp_path: Path) -> None:
    place = Workplace(tmp_path, {"SLURM_CONF": slurm.env()["SLURM_CONF"]})
    asked = ["launcher=slurm", "launcher.slurm.cpus_per_node=1", "launcher.slurm.partition=nowhere"]
    output = place.run(MUSTER, "submit", *SMALL, f"data.path={tmp_path / 'corpus'}", *asked, expect=2)
    assert "sbatch refused the job" in output and "invalid partition" in output.lower()
    assert not (tmp_path / "runs" / "e2e" / "a").exists()
