"""Addresses in MLflow's database follow a store that was moved, all or none, and no others."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from orchestrator.tracking import relocate

OLD, NEW, OTHER = "s3://old/p/mlartifacts", "s3://new/q/mlartifacts", "s3://else/mlartifacts"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as made:
        made.executescript("""
            create table experiments (name text, artifact_location text);
            create table runs (artifact_uri text);
            create table logged_models (artifact_location text);
            create table model_versions (source text);
        """)  # as of a version of MLflow without storage_location
        made.executemany("insert into experiments values (?, ?)", [("mine", OLD), ("theirs", OTHER)])
        runs = [(f"{OLD}/r1/artifacts",), (f"{OTHER}/r2/artifacts",), (None,), (f"{OLD}-not/r3",)]
        made.executemany("insert into runs values (?)", runs)
        made.execute("insert into logged_models values (?)", (f"{OLD}/models/m/artifacts",))
        made.execute("insert into model_versions values (?)", (f"{OLD}/models/m/artifacts",))
    return path


def texts(database: Path) -> list[str]:
    with sqlite3.connect(database) as read:
        return [str(text) for text in read.iterdump() if "://" in text]


def test_a_bucket_that_was_copied(database: Path) -> None:
    assert relocate.mend_remote(database, "mine", NEW, lambda: True) == 4
    said = "\n".join(texts(database))
    assert said.count(NEW) == 4
    assert OLD not in said.replace(f"{OLD}-not", "")
    assert said.count(OTHER) == 2
    assert relocate.mend_remote(database, "mine", NEW, lambda: True) == 0


@pytest.mark.parametrize("experiment", ["mine", "none"])
def test_a_new_store_without_files_is_no_copy(database: Path, experiment: str) -> None:
    before = texts(database)
    assert relocate.mend_remote(database, experiment, NEW, lambda: False) == 0
    assert texts(database) == before


def test_local_databases_leave_buckets_alone(database: Path, tmp_path: Path) -> None:
    before = texts(database)
    (tmp_path / "mlartifacts").mkdir()
    assert relocate.mend_local(database, tmp_path / "mlartifacts") == 0
    assert texts(database) == before


def local(database: Path, place: Path, *, runs: bool) -> None:
    """Have the database know a store at `place`, with a run in it or not."""
    with sqlite3.connect(database) as change:
        change.execute("update experiments set artifact_location = ?", (place.as_uri(),))
        change.execute("delete from runs")
        if runs:
            change.execute("insert into runs values (?)", (f"{place.as_uri()}/r1/artifacts",))


@pytest.mark.parametrize("runs", [True, False])
def test_a_local_database_follows_files_only(database: Path, tmp_path: Path, runs: bool) -> None:
    """The old place may be a disk that is away, and addresses that were changed stay changed."""
    here = tmp_path / "mlartifacts"
    here.mkdir()
    local(database, tmp_path / "away" / "mlartifacts", runs=runs)
    before = texts(database)
    if runs:
        assert relocate.mend_local(database, here) == 0
        assert texts(database) == before
        (here / "r1" / "artifacts").mkdir(parents=True)
    assert relocate.mend_local(database, here) == (3 if runs else 2)
    assert relocate.mend_local(database, here) == 0


def test_all_or_none(database: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = texts(database)
    with sqlite3.connect(database) as change:
        change.execute(
            "create trigger no before update on model_versions begin select raise(abort, 'no'); end"
        )
    assert relocate.mend_remote(database, "mine", NEW, lambda: True) == 0
    assert [text for text in texts(database) if "TRIGGER" not in text.upper()] == before
    assert "from their old place" in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 1000])
def test_what_is_no_database_is_mlflows_to_report(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "none.db"
    if content is not None:
        path.write_bytes(content)
    assert relocate.mend_remote(path, "mine", NEW, lambda: True) == 0
    assert path.exists() == (content is not None)
