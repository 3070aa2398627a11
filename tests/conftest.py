from pathlib import Path

import pytest

from tests.command import CALM, Workplace


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """``make test`` in a few processes, each of which takes the next group of tests when it is done with one.

    A file is a group: its tests share what it made. What takes longest begins first.
    """
    from xdist.scheduler import LoadFileScheduling  # not needed, and maybe not there, without -n

    config.option.loadscopereorder = False  # else by number of tests
    return LoadFileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first (several processes then end at the same time)."""
    first = ("test_main_job", "chaos/test_chaos_llama3", "cluster", "distributed", "chaos", "commands")

    def place(item: pytest.Item) -> int:
        return next(
            (n for n, start in enumerate(first) if item.nodeid.startswith(f"tests/{start}")), len(first)
        )

    items.sort(key=place)


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
