"""Bytes from stage to stage where the store is a bucket: workers' files are copied within it, not by the driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.pipeline.plan.stage_plan import Choice
from orchestrator.storage import artifacts as artifacts_module
from orchestrator.storage.artifacts import Artifact, ArtifactStore
from orchestrator.storage.s3 import S3Store
from orchestrator.storage.store import CannotCopyError

from .conftest import Group
from .test_handover import SMALL, TRAINED, WAYS, WORLD, Lab, new_driver, photographs

MODEL = "vit_nano"


@pytest.fixture
def lab(group: Group, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    photographs(tmp_path / "photos")
    monkeypatch.setattr(artifacts_module, "_do_not_copy", set())
    return Lab(group, tmp_path, monkeypatch, store=s3_uri)


def found(artifacts: ArtifactStore) -> dict[str, Artifact]:
    """All artifacts of the store by kind; each is compared, byte by byte."""
    made = {}
    for prefix in artifacts.prefixes():
        assert artifacts.examine(prefix) == []
        manifest = artifacts.manifest_of(prefix.split("/")[1])
        assert manifest is not None
        artifact = artifacts.find(manifest.kind, manifest.key)
        assert artifact is not None
        made[manifest.kind] = artifact
    return made


def weights(artifact: Artifact, folder: str) -> dict[str, str]:
    """The sha256 of the weights in a folder of an artifact, by their names in it."""
    digests = artifact.digests(artifact.path / folder)
    return {name: sha256 for name, sha256 in digests.items() if name.endswith(".safetensors")}


def test_weights_do_not_pass_through_the_driver(
    lab: Lab, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lab.run(MODEL, gram={"teacher": "latest"})[0] == 0
    new_driver(monkeypatch)
    for name in ("pretrain", "gram", "text"):
        for what in WAYS:
            assert lab.io[name][f"driver_{what}"] < SMALL, (name, what)
    made = found(ArtifactStore(S3Store(s3_uri)))
    pretrain, gram, text = (made[kind] for kind in ("pretrain", "gram_anchor", "align_text"))
    assert len(weights(pretrain, "checkpoint")) == len(weights(gram, "checkpoint")) == 2
    assert set(weights(gram, "lineage").values()) == set(weights(pretrain, "snapshots").values())
    assert weights(text, "aligned/tower") == weights(pretrain, "model")
    assert len(weights(text, "aligned")) == 3
    assert not list(S3Store(s3_uri).list("work/"))

    # Each worker asks for the parts of the checkpoint that its slices lie in, and fetches the Gram teacher's file.
    files = pretrain.manifest.files
    checkpoint = sum(entry.size for name, entry in files.items() if name.startswith("checkpoint/"))
    export = files["snapshots/step-00000002.safetensors"].size
    backbone = files["model/model.safetensors"].size
    for rank, counted in enumerate(lab.workers["gram"]):
        finishing = 2 * backbone if rank == 0 else 0
        own = counted["checkpoint_bytes_read"] - backbone - finishing
        assert checkpoint / WORLD - SMALL <= own <= checkpoint / WORLD + SMALL
        assert counted["artifact_bytes_read"] < 3 * export + 2 * SMALL
    here = {path.parent.name for path in pretrain.path.rglob("*.safetensors")}
    assert here == {"snapshots", "model"}, "the tower for texts and the Gram teacher alone"


def test_a_checkpoint_in_the_bucket_that_is_damaged_is_mended(
    lab: Lab, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store(s3_uri)
    assert lab.run("vit_femto", Choice(only=("curate", "pretrain")))[0] == 0
    for name in store.list("artifacts/pretrain-"):
        if "/checkpoint/" in name and name.endswith(".safetensors"):
            data = bytearray(store.get_bytes(name))
            data[-9] ^= 1
            store.put_bytes(name, bytes(data))
    new_driver(monkeypatch)
    lab.trained.clear()
    code, said = lab.run("vit_femto", TRAINED)
    assert code == 0, said
    assert lab.trained == ["gram", "pretrain", "gram"]
    assert "the artifact of pretrain is damaged and is made again" in said
    found(ArtifactStore(store))


def test_where_the_bucket_copies_nothing_they_do(
    lab: Lab, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: S3Store, source: str, target: str) -> None:
        raise CannotCopyError(f"{source} could not be copied")

    monkeypatch.setattr(S3Store, "copy", refuse)
    assert lab.run("vit_femto", Choice(only=("curate", "pretrain")))[0] == 0
    made = found(ArtifactStore(S3Store(s3_uri)))
    size = sum(entry.size for entry in made["pretrain"].manifest.files.values())
    figures = lab.io["pretrain"]
    assert size - SMALL < figures["driver_artifact_bytes_written"] < size + SMALL
    # Fetched, and read once more to be compared.
    assert 2 * size - SMALL < figures["driver_artifact_bytes_read"] < 2 * size + SMALL
