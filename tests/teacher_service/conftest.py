"""One cluster a module: starting one takes longer than most tests, and others start their own after it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .lab import Lab


@pytest.fixture(scope="module")
def whole_lab() -> Iterator[Lab]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_enable_metrics_collection", "0")
        folder = Path(tempfile.mkdtemp(prefix="share-"))
        lab = Lab(folder)
        try:
            yield lab
        finally:
            lab.close()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def lab(whole_lab: Lab) -> Iterator[Lab]:
    yield whole_lab
    whole_lab.mend()
