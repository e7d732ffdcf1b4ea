"""Files that are in the bucket already become an artifact without passing through the process that publishes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import botocore.client
import pytest
from botocore.exceptions import ClientError
from s3_faults import Kind, every_fault, goes_through

from orchestrator.byte_counts import BYTES
from orchestrator.storage import artifacts as artifacts_module
from orchestrator.storage import s3 as s3_module
from orchestrator.storage.artifacts import Artifact, ArtifactStore, DamagedError
from orchestrator.storage.references import StoredObject, refer
from orchestrator.storage.s3 import COPIED_PART, S3Store
from orchestrator.storage.s3_client import Patience

KEY, OTHER = "0123456789abcdef" * 4, "f" * 64
PREFIX = f"artifacts/pretrain-{KEY[:16]}/"
# The least that S3 takes for a part that is not the last.
PART = 5 * 2**20
SHARD, MODEL = bytes(range(256)) * 4, b"m" * (2 * PART + 3)
SMALL = 5000


@pytest.fixture(autouse=True)
def no_store_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts_module, "_do_not_copy", set())
    monkeypatch.setattr(s3_module, "COPIED_PART", PART)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def begun(store: S3Store) -> ArtifactStore:
    """A store in which workers have left a shard and a model."""
    store.put_bytes("work/x/shard", SHARD)
    store.put_bytes("work/x/model", MODEL)
    return ArtifactStore(store)


def publish(artifacts: ArtifactStore, **changes: Any) -> Artifact:
    folder = artifacts.staging("pretrain")
    (folder / "recipe.json").write_text("{}")
    refer(folder / "checkpoint/a.safetensors", StoredObject("work/x/shard", len(SHARD), sha256(SHARD)))
    model = {"name": "work/x/model", "size": len(MODEL), "sha256": sha256(MODEL), **changes}
    refer(folder / "model/model.safetensors", StoredObject(**model))
    return artifacts.publish("pretrain", KEY, folder)


WHOLE = {"recipe.json": b"{}", "checkpoint/a.safetensors": SHARD, "model/model.safetensors": MODEL}


def counted(do: Callable[[], object]) -> dict[str, int]:
    before = BYTES.metrics()
    do()
    return {name.removeprefix("driver_"): value - before[name] for name, value in BYTES.metrics().items()}


def contents(store: S3Store) -> dict[str, bytes]:
    names = [name for name in store.list(PREFIX) if not name.endswith("manifest.json")]
    return {name.removeprefix(PREFIX): store.get_bytes(name) for name in names}


class Refusals:
    """Answers copies as a server does that has none, and notes the names of all calls."""

    def __init__(self, patch: pytest.MonkeyPatch, code: str | None, status: int = 403) -> None:
        self.calls: list[str] = []
        real = botocore.client.BaseClient._make_api_call

        def call(client: Any, operation: str, arguments: Any) -> Any:
            self.calls.append(operation)
            if code is not None and operation in ("CopyObject", "UploadPartCopy"):
                answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
                raise ClientError(answer, operation)
            return real(client, operation, arguments)

        patch.setattr(botocore.client.BaseClient, "_make_api_call", call)


def test_objects_become_an_artifact_within_the_store(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts = begun(S3Store(s3_uri))
    asked = Refusals(monkeypatch, None).calls
    figures = counted(lambda: publish(artifacts))
    assert all(value < SMALL for value in figures.values()), figures
    assert "CopyObject" in asked
    assert asked.count("UploadPartCopy") == 3, "above the limit in parts"
    assert asked.count("GetObject") == 1, "of the manifest that is not there"
    assert contents(artifacts.store) == WHOLE
    made = artifacts.find("pretrain", KEY)
    assert made is not None
    assert {name: (entry.size, entry.sha256) for name, entry in made.manifest.files.items()} == {
        name: (len(data), sha256(data)) for name, data in WHOLE.items()
    }
    assert artifacts.examine(PREFIX) == []


@pytest.mark.parametrize(
    ("code", "status"),
    [("AccessDenied", 403), ("NotImplemented", 501), ("MethodNotAllowed", 405), ("Unknown", 501)],
)
def test_where_nothing_is_copied_files_pass_through(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: str, status: int
) -> None:
    artifacts = begun(S3Store(s3_uri))
    Refusals(monkeypatch, code, status)
    figures = counted(lambda: publish(artifacts))
    moved = len(SHARD) + len(MODEL)
    # Fetched, and read once more to be compared.
    assert 2 * moved <= figures["artifact_bytes_read"] < 2 * moved + SMALL
    assert moved <= figures["artifact_bytes_written"] < moved + SMALL
    assert contents(artifacts.store) == WHOLE
    assert artifacts.examine(PREFIX) == []
    said = [record.message for record in caplog.records if "does not copy objects" in record.message]
    assert len(said) == 1
    assert s3_uri in said[0]
    assert (code if code != "Unknown" else "UploadPartCopy") in said[0] or "CopyObject" in said[0]


def test_where_a_copy_comes_out_empty_files_pass_through(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a server that takes a copy for a put of nothing."""
    monkeypatch.setattr(S3Store, "copy", lambda store, source, target: store.put_bytes(target, b""))
    artifacts = begun(S3Store(s3_uri))
    publish(artifacts)
    assert contents(artifacts.store) == WHOLE
    assert artifacts.examine(PREFIX) == []
    assert ["does not copy objects" in record.message for record in caplog.records] == [True]


def test_another_mistake_is_none_of_a_server_without_copies(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = begun(S3Store(s3_uri))
    Refusals(monkeypatch, "InvalidRequest", 400)
    with pytest.raises(OSError, match=r"could not copy work/x/(shard|model)"):
        publish(artifacts)
    assert artifacts.find("pretrain", KEY) is None


@pytest.mark.parametrize("copies", [True, False])
def test_an_object_that_is_not_as_large_as_it_was_said_is_no_artifact(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, copies: bool
) -> None:
    artifacts = begun(S3Store(s3_uri))
    if not copies:
        Refusals(monkeypatch, "AccessDenied")
    with pytest.raises(DamagedError, match=f"{len(MODEL)} bytes, should be {len(MODEL) + 1}"):
        publish(artifacts, size=len(MODEL) + 1)
    assert artifacts.find("pretrain", KEY) is None


def test_an_object_with_another_content_is_found_where_it_is_read(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = begun(S3Store(s3_uri))
    made = publish(artifacts, sha256="0" * 64)
    with pytest.raises(DamagedError, match=r"model\.safetensors in the store is damaged"):
        artifacts.fetch(made)
    artifacts.store.delete(f"{PREFIX}manifest.json")
    Refusals(monkeypatch, "AccessDenied")
    with pytest.raises(DamagedError, match="work/x/model is damaged"):
        publish(artifacts, sha256="0" * 64)


def test_a_slow_server_copies_all_parts_at_once_within_the_time_of_a_request() -> None:
    in_flight = COPIED_PART * s3_module.THREADS * artifacts_module.AT_ONCE
    assert in_flight / 100e6 < Patience().read_s


def test_nothing_more_is_copied_once_an_object_could_not_be(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts_module, "AT_ONCE", 1)
    artifacts = begun(S3Store(s3_uri))
    folder = artifacts.staging("pretrain")
    for number in range(20):
        refer(folder / f"{number}.safetensors", StoredObject(f"work/x/{number}", 1, "0" * 64))
    asked = Refusals(monkeypatch, None).calls
    with pytest.raises(FileNotFoundError):
        artifacts.publish("pretrain", KEY, folder)
    assert asked.count("HeadObject") < 20


@pytest.mark.parametrize("name", ["work/x/gone", "work/x/shard/below"])
def test_an_object_that_is_gone(s3_uri: str, name: str) -> None:
    artifacts = begun(S3Store(s3_uri))
    with pytest.raises(FileNotFoundError):
        publish(artifacts, name=name)
    assert artifacts.find("pretrain", KEY) is None


def test_what_is_needed_of_an_artifact_is_fetched(s3_uri: str) -> None:
    artifacts = begun(S3Store(s3_uri))
    made = publish(artifacts)

    def here() -> set[str]:
        found = {path.relative_to(made.path).as_posix() for path in made.path.rglob("*") if path.is_file()}
        return found - {"manifest.json"}

    def fetch(**what: Any) -> int:
        """Bytes that were read: a file is fetched, and read once more to be compared."""
        return counted(lambda: artifacts.fetch(made, **what))["artifact_bytes_read"]

    assert here() == {"recipe.json"}
    # No weights; a file that is younger than a tick is hashed again.
    assert fetch(uncompared=("checkpoint", "model")) < len(SHARD)
    assert here() == {"recipe.json"}
    assert fetch(only=("checkpoint",)) == 2 * len(SHARD)
    assert here() == {"recipe.json", "checkpoint/a.safetensors"}
    assert 2 * len(MODEL) <= fetch() < 2 * len(MODEL) + SMALL
    assert here() == set(WHOLE)


def test_a_file_of_one_artifact_becomes_one_of_another(s3_uri: str) -> None:
    artifacts = begun(S3Store(s3_uri))
    made = publish(artifacts)
    folder = artifacts.staging("distill")
    made.link("checkpoint/a.safetensors", folder / "lineage/a.safetensors")
    made.link_folder(made.path / "model", folder / "model")
    figures = counted(lambda: artifacts.publish("distill", OTHER, folder))
    assert all(value < SMALL for value in figures.values()), figures
    other = artifacts.intact("distill", OTHER)
    assert other is not None
    assert (other.path / "lineage/a.safetensors").read_bytes() == SHARD
    assert (other.path / "model/model.safetensors").read_bytes() == MODEL


@pytest.mark.parametrize("kind", ["lost", "away"])
def test_it_is_absent_or_whole_whatever_request_fails(s3_uri: str, kind: Kind) -> None:
    for server in every_fault(kind, at_least=8):
        artifacts = begun(S3Store(f"{s3_uri}/{server.fail_at}"))
        went = goes_through(server, lambda: publish(artifacts))  # noqa: B023
        found = ArtifactStore(S3Store(f"{s3_uri}/{server.fail_at}")).intact("pretrain", KEY)
        assert found is not None or not went, server.done
        publish(artifacts)
        assert artifacts.examine(PREFIX) == []
        assert contents(artifacts.store) == WHOLE
        assert json.loads(artifacts.store.get_bytes(f"{PREFIX}manifest.json"))["kind"] == "pretrain"
