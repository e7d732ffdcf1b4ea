from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.store.artifact import Artifact, ArtifactStore
from orchestrator.store.local import LocalStore

KEY = "0123456789abcdef" * 4


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
    assert artifacts.verify("pretrain", KEY, deep=True) == []
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
    assert artifacts.verify("pretrain", KEY)[0].endswith("model.safetensors: missing")
    publish(artifacts, "again")
    assert path.read_text() == "again"
    assert artifacts.verify("pretrain", KEY, deep=True) == []


def test_only_a_deep_check_sees_a_flipped_byte(artifacts: ArtifactStore) -> None:
    path = publish(artifacts).path / "sub" / "model.safetensors"
    path.write_text("weightz")
    assert artifacts.verify("pretrain", KEY) == []
    assert "sha256" in artifacts.verify("pretrain", KEY, deep=True)[0]


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
from orchestrator.store.artifact import ArtifactStore
from orchestrator.store.local import LocalStore
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
