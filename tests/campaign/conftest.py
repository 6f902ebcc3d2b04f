"""A worker that has imported everything and built the tiny project, for all tests of a process."""

from collections.abc import Iterator

import pytest

from campaign.command import Worker, started_worker


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    with started_worker() as started:
        yield started
