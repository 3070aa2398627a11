from pathlib import Path

import pytest

from tests.command import CALM, Workplace


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """``make test`` in two processes, each of which takes the next group of tests when it is done with one.

    Nodes of tests/cluster have names and addresses, and tests/distributed pools of processes: each of these is one
    group. The largest groups begin first; long single tests go with them, not to the end.
    """
    from xdist.scheduler import LoadScopeScheduling  # not needed, and maybe not there, without -n

    class Lanes(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder = file.split("/")[1]
            if folder in ("unit", "conf", "distributed"):
                return folder
            return "long" if folder in ("cluster", "test_main_job.py") or "llama3" in file else file

    return Lanes(config, log)


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    """A folder of its own to run `muster` in."""
    return Workplace(tmp_path)


@pytest.fixture(scope="module")
def shared_workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """One folder for all tests of a module."""
    return Workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """``CALM`` trained without a disturbance: what a disturbed run must end with. Only to be read."""
    workplace = Workplace(tmp_path_factory.mktemp("calm"))
    workplace.train(*CALM, "checkpoint.every=4")
    return workplace
