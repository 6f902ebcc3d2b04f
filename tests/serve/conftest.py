"""A server that the tests of a file share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, serve
from tiny import make_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two untrained models with a context of 16 tokens."""
    root = tmp_path_factory.mktemp("models")
    return [make_model(root / name, seed) for seed, name in enumerate(("gpt", "other"))]


@pytest.fixture(scope="module")
def served(folders: list[Path]) -> Iterator[Served]:
    with serve(folders) as running:
        yield running
