"""Fixtures of more than one file in this folder."""

from pathlib import Path

import pytest
from toy_project import Project


@pytest.fixture
def project(tmp_path: Path, toy_split: Path) -> Project:
    """A project in which nothing was trained yet."""
    return Project(tmp_path, toy_split)
