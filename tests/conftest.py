from pathlib import Path

import pytest

from tests.command import Workplace


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    """A folder of its own to run `muster` in."""
    return Workplace(tmp_path)


@pytest.fixture(scope="module")
def shared_workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """One folder for all tests of a module."""
    return Workplace(tmp_path_factory.mktemp("workplace"))
