from pathlib import Path

import pytest

from tests.command import CALM, Workplace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two lanes for ``make test``: one computes, the other starts commands and waits for them."""
    for item in items:
        lane = Path(item.path).relative_to(Path(__file__).parent).parts[0]
        item.add_marker(pytest.mark.xdist_group("compute" if lane in _COMPUTE else "commands"))


_COMPUTE = ("unit", "conf", "distributed")


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
