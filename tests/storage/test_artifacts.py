from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.fsio import DIGESTS, Digests
from orchestrator.storage.artifacts import Artifact, ArtifactStore, DamagedError
from orchestrator.storage.local import LocalStore

KEY = "0123456789abcdef" * 4
PREFIX = "artifacts/pretrain-0123456789abcdef/"
ENTRY = {"size": 0, "sha256": "0" * 64}


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(LocalStore(tmp_path / "store"))


def publish(artifacts: ArtifactStore, content: str = "weights", **summary: float) -> Artifact:
    folder = artifacts.staging("pretrain")
    (folder / "sub").mkdir()
    (folder / "sub" / "model.safetensors").write_text(content)
    (folder / "config.json").write_text("{}")
    return artifacts.publish("pretrain", KEY, folder, {"config": {"lr": 1e-3}}, summary)


def test_published_artifact_is_found_with_everything_it_came_with(artifacts: ArtifactStore) -> None:
    assert artifacts.find("pretrain", KEY) is None
    made = publish(artifacts, loss=math.nan, knn=0.5)
    found = artifacts.find("pretrain", KEY)

    assert found is not None
    assert found.path == made.path
    assert (found.path / "sub" / "model.safetensors").read_text() == "weights"
    assert found.manifest.provenance == {"config": {"lr": 1e-3}}
    assert found.manifest.summary["knn"] == 0.5
    assert math.isnan(found.manifest.summary["loss"])
    assert sorted(found.manifest.files) == ["config.json", "sub/model.safetensors"]
    assert artifacts.examine(PREFIX) == []
    assert artifacts.find("distill", KEY) is None
    assert artifacts.find("pretrain", KEY[:16] + "f" * 48) is None


def test_same_key_keeps_the_first_artifact(artifacts: ArtifactStore) -> None:
    first = publish(artifacts, "first")
    second = publish(artifacts, "second")
    assert second.manifest == first.manifest
    assert (second.path / "sub" / "model.safetensors").read_text() == "first"


def test_an_artifact_made_anew_replaces_the_first_as_a_whole(artifacts: ArtifactStore) -> None:
    first = publish(artifacts, "first")
    folder = artifacts.staging("pretrain")
    (folder / "other.json").write_text("{}")
    second = artifacts.publish("pretrain", KEY, folder, anew=True)
    found = artifacts.find("pretrain", KEY)
    assert found is not None
    assert found.manifest == second.manifest
    assert {path.name for path in found.path.rglob("*") if path.is_file()} == {"other.json", "manifest.json"}
    assert second.manifest.digest != first.manifest.digest
    assert publish(artifacts, "third").manifest == second.manifest


def test_a_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    made = []
    for name, content, knn in (("a", "same", 1.0), ("b", "same", 2.0), ("c", "other", 1.0)):
        artifacts = ArtifactStore(LocalStore(tmp_path / name))
        made.append(publish(artifacts, content, knn=knn).manifest.digest)
    assert made[0] == made[1] != made[2]


def test_missing_and_truncated_files_make_it_absent_until_made_again(artifacts: ArtifactStore) -> None:
    path = publish(artifacts).path / "sub" / "model.safetensors"
    path.write_text("weigh")
    assert artifacts.find("pretrain", KEY) is None
    path.unlink()
    assert artifacts.find("pretrain", KEY) is None
    assert artifacts.examine(PREFIX)[0].endswith("model.safetensors: missing")
    publish(artifacts, "again")
    assert path.read_text() == "again"
    assert artifacts.examine(PREFIX) == []


def test_only_a_deep_check_sees_a_flipped_byte(artifacts: ArtifactStore) -> None:
    path = publish(artifacts).path / "sub" / "model.safetensors"
    path.write_text("weightz")
    assert artifacts.find("pretrain", KEY) is not None
    assert "sha256" in artifacts.examine(PREFIX)[0]


def test_a_flipped_byte_is_seen_by_whoever_reads_and_mended_by_whoever_publishes(
    artifacts: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    made = publish(artifacts)
    assert artifacts.fetch(made) == made.path
    (made.path / "sub" / "model.safetensors").write_text("weightz")
    with pytest.raises(DamagedError, match=r"sub/model\.safetensors: content differs") as caught:
        artifacts.fetch(made)
    assert len(caught.value.problems) == 1
    assert artifacts.intact("pretrain", KEY) is None
    assert "is damaged and will be made again" in caplog.text
    assert (publish(artifacts, "weights").path / "sub" / "model.safetensors").read_text() == "weights"
    assert artifacts.intact("pretrain", KEY) is not None


def test_a_file_is_read_once_as_long_as_it_does_not_change(artifacts: ArtifactStore) -> None:
    made = publish(artifacts)
    for path in made.path.rglob("*.*"):
        os.utime(path, (1e9, 1e9))
    artifacts.fetch(made)
    before = DIGESTS.bytes_read
    for _ in range(3):
        artifacts.fetch(made)
        ArtifactStore(LocalStore(artifacts.store.root)).intact("pretrain", KEY)
        publish(artifacts, "whatever else")
    whatever_was_published = 3 * len("{}" + "whatever else")
    assert DIGESTS.bytes_read - before <= whatever_was_published
    (made.path / "config.json").write_text("[]")
    with pytest.raises(DamagedError, match=r"config\.json"):
        artifacts.fetch(made)


def test_a_changed_file_is_read_again_though_it_looks_the_same(tmp_path: Path) -> None:
    """Two writes within a tick of the file system's clock leave the same size, inode and time."""
    digests, path = Digests(), tmp_path / "file"
    now = time.time_ns() + 10**9
    path.write_text("one")
    os.utime(path, ns=(now, now))
    first = digests.of(path)
    path.write_text("two")
    os.utime(path, ns=(now, now))
    assert digests.of(path) != first


def test_surplus_files_are_damage(artifacts: ArtifactStore) -> None:
    made = publish(artifacts)
    (made.path / "sub" / "extra").write_text("")
    assert artifacts.find("pretrain", KEY) is None
    assert artifacts.examine(f"artifacts/pretrain-{KEY[:16]}/") == [
        f"artifacts/pretrain-{KEY[:16]}/sub/extra: is not in the manifest"
    ]
    publish(artifacts)
    assert sorted(path.name for path in made.path.rglob("*.*")) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"files": {}}, "lists no files"),
        ({"files": {"/etc/out": ENTRY}}, "not an object name"),
        ({"files": {"../out": ENTRY}}, "not an object name"),
        ({"files": {"manifest.json": ENTRY}}, "does not list itself"),
        ({"files": {"config.json": {"size": -1, "sha256": "0" * 64}}}, "greater than or equal to 0"),
        ({"files": {"config.json": {"size": 2, "sha256": "x"}}}, "match pattern"),
        ({"key": "f" * 64}, "is the manifest of"),
    ],
)
def test_a_manifest_that_cannot_be_is_damage(
    artifacts: ArtifactStore, change: dict[str, object], said: str
) -> None:
    manifest = publish(artifacts).path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    assert artifacts.find("pretrain", KEY) is None
    [problem] = artifacts.examine(f"artifacts/pretrain-{KEY[:16]}/")
    assert said in problem
    assert "\n" not in problem
    publish(artifacts)
    assert artifacts.examine(f"artifacts/pretrain-{KEY[:16]}/") == []


def test_a_later_versions_fields_are_kept_and_its_format_is_left_alone(artifacts: ArtifactStore) -> None:
    manifest = publish(artifacts).path / "manifest.json"
    written = json.loads(manifest.read_text())
    assert written["format"] == 1
    del written["format"]
    manifest.write_text(json.dumps(written | {"signature": "abc"}))
    found = artifacts.find("pretrain", KEY)
    assert found is not None, "a manifest of an earlier version has no format"
    assert json.loads(found.manifest.model_dump_json())["signature"] == "abc"

    manifest.write_text(json.dumps(written | {"format": 2, "files": []}))
    for use in (lambda: artifacts.find("pretrain", KEY), lambda: publish(artifacts)):
        with pytest.raises(UserError, match="format 2, and this version reads formats up to 1") as caught:
            use()
        assert "manifest.json" in str(caught.value.where)
    assert json.loads(manifest.read_text())["format"] == 2


def test_an_empty_folder_is_no_artifact(artifacts: ArtifactStore) -> None:
    with pytest.raises(ValueError, match="at least one file"):
        artifacts.publish("pretrain", KEY, artifacts.staging("x"))


@pytest.mark.parametrize("text", ["", "{", '{"kind": "pretrain"}'])
def test_unreadable_manifest_counts_as_none(artifacts: ArtifactStore, text: str) -> None:
    manifest = publish(artifacts).path / "manifest.json"
    manifest.write_text(text)
    assert artifacts.find("pretrain", KEY) is None
    assert publish(artifacts).manifest.key == KEY
    assert json.loads(manifest.read_text())["key"] == KEY


def test_killed_before_the_manifest_leaves_no_artifact_and_no_litter(tmp_path: Path) -> None:
    code = f"""
import os, signal
from orchestrator.storage.artifacts import ArtifactStore
from orchestrator.storage.local import LocalStore
class Dies(LocalStore):
    def put_bytes(self, name, data):
        os.kill(os.getpid(), signal.SIGKILL)
artifacts = ArtifactStore(Dies({str(tmp_path)!r}))
folder = artifacts.staging("x")
(folder / "stale").write_text("stale")
artifacts.publish("pretrain", {KEY!r}, folder)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    artifacts = ArtifactStore(LocalStore(tmp_path))
    assert list(artifacts.store.list("artifacts/")), "the kill must come after the files"
    assert artifacts.find("pretrain", KEY) is None
    made = publish(artifacts)
    assert sorted(path.name for path in made.path.rglob("*") if path.is_file()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]


def test_links_and_a_manifest_of_ones_own_are_refused(artifacts: ArtifactStore) -> None:
    folder = artifacts.staging("a")
    (folder / "manifest.json").touch()
    with pytest.raises(ValueError, match=r"manifest\.json"):
        artifacts.publish("curate", KEY, folder)
    folder = artifacts.staging("b")
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="plain files"):
        artifacts.publish("curate", KEY, folder)
    assert artifacts.find("curate", KEY) is None
