"""Artifacts in S3: what is fetched, when, and what if it is damaged on the way or in the store."""

from __future__ import annotations

import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from s3_server import S3Server

from orchestrator.errors import UserError
from orchestrator.storage.artifacts import Artifact, ArtifactStore
from orchestrator.storage.open import Needed, fetch
from orchestrator.storage.s3 import S3Store

KEY = "0123456789abcdef" * 4
PREFIX = "artifacts/pretrain-0123456789abcdef/"


@pytest.fixture
def proxy(s3: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.endpoint) as faulty:
        s3.use(monkeypatch, faulty.endpoint)
        yield faulty


@pytest.fixture
def artifacts(proxy: FaultyProxy, s3_uri: str) -> ArtifactStore:
    return ArtifactStore(S3Store(s3_uri))


def publish(artifacts: ArtifactStore, content: str = "weights") -> Artifact:
    folder = artifacts.staging("pretrain")
    (folder / "sub").mkdir()
    (folder / "sub" / "model.safetensors").write_text(content)
    (folder / "config.json").write_text("{}")
    return artifacts.publish("pretrain", KEY, folder, {"config": {"lr": 1e-3}}, {"loss": math.nan})


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


WHOLE = {"config.json": "{}", "sub/model.safetensors": "weights"}


def downloads(proxy: FaultyProxy, since: int) -> list[str]:
    gets = [path for method, path in proxy.requests[since:] if method == "GET" and "list-type" not in path]
    return [path for path in gets if not path.endswith("manifest.json")]


def another_machine(artifacts: ArtifactStore) -> None:
    shutil.rmtree(artifacts.store.root)


def test_what_was_made_here_is_not_fetched_here(artifacts: ArtifactStore, proxy: FaultyProxy) -> None:
    assert artifacts.find("pretrain", KEY) is None
    made = publish(artifacts)
    assert contents(made.path) == WHOLE
    since = len(proxy.requests)
    assert artifacts.fetch(made) == made.path
    assert proxy.requests[since:] == []


def test_finding_downloads_nothing_and_fetching_everything_once(
    artifacts: ArtifactStore, proxy: FaultyProxy
) -> None:
    made = publish(artifacts)
    another_machine(artifacts)
    since = len(proxy.requests)
    found = artifacts.find("pretrain", KEY)
    assert found is not None
    assert found.path == made.path
    assert found.manifest.provenance == {"config": {"lr": 1e-3}}
    assert math.isnan(found.manifest.summary["loss"])
    assert downloads(proxy, since) == []
    assert not found.path.exists()

    assert contents(artifacts.fetch(found)) == WHOLE
    assert len(downloads(proxy, since)) == 2
    artifacts.fetch(found)
    assert len(downloads(proxy, since)) == 2


def test_workers_fetch_by_name(artifacts: ArtifactStore, s3_uri: str) -> None:
    made = publish(artifacts)
    another_machine(artifacts)
    assert fetch(s3_uri, "pretrain", KEY) == made.path
    assert contents(made.path) == WHOLE
    another_machine(artifacts)
    assert fetch(*Needed(s3_uri, "pretrain", KEY, ("sub",))) == made.path
    assert contents(made.path) == {"sub/model.safetensors": "weights"}
    with pytest.raises(FileNotFoundError, match="distill"):
        fetch(s3_uri, "distill", KEY)


def test_a_file_that_was_damaged_on_the_way_is_fetched_again(
    artifacts: ArtifactStore, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    made = publish(artifacts)
    another_machine(artifacts)
    proxy.next("flip", when=lambda method, path: method == "GET" and path.endswith("model.safetensors"))
    assert contents(artifacts.fetch(made)) == WHOLE
    assert "wrong sha256" in caplog.text


def test_a_file_that_is_damaged_in_the_store_is_named(artifacts: ArtifactStore) -> None:
    made = publish(artifacts)
    another_machine(artifacts)
    artifacts.store.put_bytes(f"artifacts/pretrain-{KEY[:16]}/sub/model.safetensors", b"weightz")
    with pytest.raises(UserError, match=r"model\.safetensors in the store is damaged") as caught:
        artifacts.fetch(made)
    assert "manifest.json" in str(caught.value.hint)
    assert "sub/model.safetensors" not in contents(made.path)
    assert not (made.path / "manifest.json").exists()
    assert artifacts.find("pretrain", KEY) is not None
    assert "sha256" in artifacts.examine(PREFIX)[0]


def test_missing_and_truncated_objects_make_it_absent_until_made_again(artifacts: ArtifactStore) -> None:
    publish(artifacts)
    name = f"artifacts/pretrain-{KEY[:16]}/sub/model.safetensors"
    artifacts.store.put_bytes(name, b"weigh")
    assert artifacts.find("pretrain", KEY) is None
    artifacts.store.delete(name)
    assert artifacts.examine(PREFIX) == [f"{name}: missing"]
    made = publish(artifacts, "again")
    assert contents(artifacts.fetch(made))["sub/model.safetensors"] == "again"
    assert artifacts.examine(PREFIX) == []


def test_a_copy_of_an_earlier_artifact_of_the_same_key_is_replaced(artifacts: ArtifactStore) -> None:
    publish(artifacts, "earlier")
    artifacts.store.delete(f"artifacts/pretrain-{KEY[:16]}/manifest.json")
    elsewhere = ArtifactStore(artifacts.store)
    stale = artifacts.store.root.with_name("stale")
    artifacts.store.root.rename(stale)
    publish(elsewhere, "weights")
    another_machine(artifacts)
    stale.rename(artifacts.store.root)
    found = artifacts.find("pretrain", KEY)
    assert found is not None
    assert contents(found.path)["sub/model.safetensors"] == "earlier"
    assert contents(artifacts.fetch(found)) == WHOLE


def test_a_copy_that_lost_a_file_is_mended(artifacts: ArtifactStore) -> None:
    made = publish(artifacts)
    (made.path / "config.json").unlink()
    (made.path / "sub" / "model.safetensors").write_text("weigh")
    assert contents(artifacts.fetch(made)) == WHOLE


def test_two_processes_fetch_at_once(artifacts: ArtifactStore, proxy: FaultyProxy, s3_uri: str) -> None:
    publish(artifacts)
    another_machine(artifacts)
    code = (
        "import sys; from orchestrator.storage.open import fetch\n"
        "from orchestrator.storage.s3 import S3Store\n"
        f"S3Store({s3_uri!r}).check()\n"
        f"print('up', flush=True); sys.stdin.read(); fetch({s3_uri!r}, 'pretrain', {KEY!r})"
    )
    is_file = re.compile(r"config\.json|model\.safetensors").search
    proxy.next(*["late"] * 4, when=lambda method, path: method == "GET" and bool(is_file(path)))
    since = len(proxy.requests)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(60) for process in processes] == [0, 0]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    assert len(downloads(proxy, since)) == 2, "the second waits and finds it there"
    assert contents(artifacts.store.local(f"artifacts/pretrain-{KEY[:16]}")) == WHOLE


def test_killed_before_the_manifest_leaves_no_artifact(artifacts: ArtifactStore) -> None:
    uri = artifacts.store.uri
    code = f"""
import os, signal
from orchestrator.storage.artifacts import ArtifactStore
from orchestrator.storage.s3 import S3Store
class Dies(S3Store):
    def put_bytes(self, name, data):
        os.kill(os.getpid(), signal.SIGKILL)
artifacts = ArtifactStore(Dies({uri!r}))
folder = artifacts.staging("x")
(folder / "stale").write_text("stale")
artifacts.publish("pretrain", {KEY!r}, folder)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert [name.rpartition("/")[2] for name in artifacts.store.list("artifacts/")] == ["stale"]
    assert artifacts.find("pretrain", KEY) is None
    publish(artifacts)
    names = sorted(name.rpartition("/")[2] for name in artifacts.store.list("artifacts/"))
    assert names == ["config.json", "manifest.json", "model.safetensors"]
