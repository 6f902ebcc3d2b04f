from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def toy_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_split(tmp_path_factory.mktemp("toy"))
