from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    workers = Pool(4)
    yield workers
    workers.close()
