"""A user's folder with a pipeline that can run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ports import free_port

from .checking import PHOTOS, PIPELINE, machine


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with photos, all with a caption, and a pipeline, on a machine with room for it."""
    monkeypatch.chdir(tmp_path)
    machine(monkeypatch)
    (tmp_path / "photos").mkdir()
    for number in range(PHOTOS):
        (tmp_path / "photos" / f"{number:02}.jpg").write_bytes(b"%d" % number)
    rows = [f"{number:02}.jpg,dish {number}" for number in range(PHOTOS)]
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(PIPELINE, sort_keys=False))
    return tmp_path


@pytest.fixture
def closed_port() -> int:
    """A port of this machine that nothing listens on."""
    return free_port()
