"""Fixtures shared by the tests of loaders."""

import pytest
from forked import quick_workers
from videos import bad_copies, numbered_samples

from zeroi2v.data.annotations import Sample


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    return numbered_samples(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def bad_samples(samples, tmp_path_factory) -> list[Sample]:
    return bad_copies(samples, tmp_path_factory.mktemp("bad"))


@pytest.fixture
def forked_workers(monkeypatch) -> None:
    """Workers are forked, not spawned: they import nothing."""
    quick_workers(monkeypatch)
