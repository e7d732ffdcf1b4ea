from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.tracking.run import Tracking


@pytest.fixture
def uri(empty_database: Path, tmp_path: Path) -> str:
    """A fresh database in a folder of its own."""
    path = tmp_path / "runs" / "mlflow.db"
    path.parent.mkdir()
    shutil.copyfile(empty_database, path)
    return f"sqlite:///{path}"


@pytest.fixture
def start(uri: str, tmp_path: Path) -> Iterator[Callable[[], Tracking]]:
    """Starts tracking as a new driver would, always with the same spool."""
    started: list[Tracking] = []

    def make() -> Tracking:
        started.append(Tracking(uri, "food", tmp_path / "spool"))
        return started[-1]

    yield make
    for tracking in started:
        tracking.close(timeout=0)
