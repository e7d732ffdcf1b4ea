"""S3 on bad days: a faulty network before a real server, wrong settings, killed processes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from faulty_proxy import KINDS, FaultyProxy
from ports import free_port
from s3_server import S3Server

from orchestrator.errors import UserError
from orchestrator.storage import s3_client
from orchestrator.storage.open import open_store
from orchestrator.storage.s3 import S3Store
from orchestrator.storage.s3_client import Patience, StoreError

MIB = 2**20
BRISK = Patience(connect_s=1.0, read_s=1.0, attempts=10, slowest=1e6)


@pytest.fixture
def proxy(s3: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Stands between the test's store and the server."""
    with FaultyProxy(s3.endpoint, hang_s=1.5) as faulty:
        s3.use(monkeypatch, faulty.endpoint)
        yield faulty


@pytest.fixture
def store(proxy: FaultyProxy, s3_uri: str) -> S3Store:
    return S3Store(s3_uri, BRISK)


def pattern(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def is_get(method: str, path: str) -> bool:
    return method == "GET" and "list-type" not in path


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_survives_every_fault(
    store: S3Store, proxy: FaultyProxy, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").write_bytes(pattern(1000))
    operations: list[Callable[[], object]] = [
        lambda: store.put_bytes("bytes", b"content"),
        lambda: store.put_file("file", tmp_path / "file"),
        lambda: store.get_bytes("bytes"),
        lambda: store.get_file("file", tmp_path / "copy"),
        lambda: store.copy("file", "other"),
        lambda: store.get_range("file", 10, 500),
        lambda: list(store.list()),
        lambda: store.stat("file"),
        lambda: store.delete("bytes"),
        lambda: store.delete("other"),
    ]
    for operation in operations:
        proxy.next(kind)
        operation()
    assert proxy.injected[kind] == len(operations)
    assert (tmp_path / "copy").read_bytes() == pattern(1000)
    assert list(store.list()) == ["file"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "file"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_survives_every_fault(store: S3Store, proxy: FaultyProxy, kind: str) -> None:
    store.put_bytes("bytes", pattern(1000))
    proxy.next(kind, when=lambda method, path: method == "PUT")
    store.copy("bytes", "copy")
    assert proxy.injected[kind] == 1
    assert store.get_bytes("copy") == pattern(1000)


def test_parts_whose_replies_break_off_are_asked_for_again(
    store: S3Store, proxy: FaultyProxy, tmp_path: Path
) -> None:
    data = pattern(40 * MIB)
    (tmp_path / "file").write_bytes(data)
    store.put_file("big", tmp_path / "file")
    proxy.next("truncate", "truncate", "", "truncate", "lost", when=is_get)
    before = len(proxy.requests)
    store.get_file("big", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert proxy.injected["truncate"] == 3
    gets = [path for method, path in proxy.requests[before:] if is_get(method, path)]
    assert len(gets) == 3 + 4, "three parts, four of which were asked for again"


def test_an_object_that_is_replaced_while_it_is_read_is_read_anew(
    store: S3Store, proxy: FaultyProxy, s3: S3Server, tmp_path: Path
) -> None:
    old, new = pattern(40 * MIB), pattern(39 * MIB)
    (tmp_path / "file").write_bytes(old)
    store.put_file("big", tmp_path / "file")
    gets = 0

    def second_get(method: str, path: str) -> bool:
        nonlocal gets
        gets += is_get(method, path)
        if gets == 2:
            s3.client().put_object(Bucket=store.bucket, Key=store._key("big"), Body=new)
        return False

    proxy.next("500", when=second_get)
    store.get_file("big", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == new
    assert gets > 3


def test_an_empty_object_is_read(store: S3Store, tmp_path: Path) -> None:
    store.put_bytes("empty", b"")
    assert store.get_bytes("empty") == b""
    store.get_file("empty", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


def test_a_storm_of_faults_loses_nothing(store: S3Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    store.put_bytes("warm", b"")
    proxy.rate, proxy.kinds = 0.3, ("500", "503", "drop", "lost", "truncate", "slow")
    contents = {f"object-{number:02d}": pattern(number * 1000) for number in range(12)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: store.put_bytes(*item), contents.items()))
        got = list(pool.map(store.get_bytes, contents))
    big = tmp_path / "big"
    big.write_bytes(pattern(50 * MIB))
    store.put_file("big", big)
    store.get_file("big", tmp_path / "copy")
    proxy.rate = 0.0
    assert got == list(contents.values())
    assert (tmp_path / "copy").read_bytes() == big.read_bytes()
    assert list(store.list("object")) == list(contents)
    assert sum(proxy.injected.values()) >= 8
    assert len(proxy.injected) >= 4


def test_a_completed_upload_whose_reply_was_lost_is_whole(
    store: S3Store, proxy: FaultyProxy, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(pattern(20 * MIB))
    proxy.next("lost", when=lambda method, path: method == "POST" and "uploadId=" in path)
    store.put_file("big", tmp_path / "file")
    assert proxy.injected["lost"] == 1
    assert hashlib.sha256(store.get_bytes("big")).digest() == hashlib.sha256(pattern(20 * MIB)).digest()


def test_parts_that_break_off_are_asked_for_again_after_growing_pauses(
    store: S3Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_bytes("file", pattern(1000))
    for end in ("truncate", ""):
        pauses: list[float] = []
        monkeypatch.setattr(s3_client, "_sleep", pauses.append)
        proxy.next(*["truncate"] * 9, end, when=is_get)
        if end:
            with pytest.raises(StoreError, match="its replies keep breaking off"):
                store.get_bytes("file")
        else:
            assert store.get_bytes("file") == pattern(1000)
        bounds = [min(2**number, 20) for number in range(9)]
        assert len(pauses) == 9, "none after the last time"
        assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))


class _Dripping(BaseHTTPRequestHandler):
    """Answers with one byte at a time, 30 s in all."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1500")
        self.send_header("ETag", '"1"')
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(1500):
                self.wfile.write(b"x")
                time.sleep(0.02)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_reply_of_single_bytes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them comes in time: it is given up before they are all there."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Dripping)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    store = S3Store("s3://bucket/prefix", Patience(connect_s=5.0, read_s=0.5, attempts=1, slowest=1e6))
    try:
        with pytest.raises(StoreError, match=r"only [0-9]{1,3} bytes in"):
            store.get_bytes("file")
    finally:
        server.shutdown()
        server.server_close()


def test_a_reply_that_crawls_for_ever_is_given_up(proxy: FaultyProxy, s3_uri: str) -> None:
    store = S3Store(s3_uri, Patience(connect_s=1.0, read_s=0.1, attempts=2, slowest=1e9))
    store.put_bytes("object", pattern(MIB))
    proxy.next("slow", "slow", when=is_get)
    with pytest.raises(StoreError, match="breaking off"):
        store.get_bytes("object")
    assert store.get_bytes("object") == pattern(MIB)


def test_an_outage_that_lasts_is_an_error_that_says_so(
    proxy: FaultyProxy, s3_uri: str, tmp_path: Path
) -> None:
    store = S3Store(s3_uri, Patience(connect_s=1.0, read_s=1.0, attempts=2))
    store.put_bytes("object", b"old")
    (tmp_path / "file").write_bytes(pattern(20 * MIB))
    for kind, words in (("503", "Reduce rate"), ("drop", "closed"), ("500", "internal error")):
        proxy.rate, proxy.kinds = 1.0, (kind,)
        with pytest.raises(StoreError, match=words):
            store.put_bytes("object", b"new")
        with pytest.raises(StoreError, match=words):
            store.put_file("object", tmp_path / "file")
        with pytest.raises(StoreError):
            store.get_file("object", tmp_path / "copy")
    proxy.rate = 0.0
    assert store.get_bytes("object") == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


def test_a_failed_upload_gives_its_parts_up(
    store: S3Store, proxy: FaultyProxy, s3: S3Server, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(pattern(40 * MIB))
    hopeless = S3Store(store.uri, Patience(connect_s=1.0, read_s=1.0, attempts=2))
    proxy.next("500", "500", when=lambda method, path: "partNumber=2" in path)
    with pytest.raises(StoreError, match="internal error"):
        hopeless.put_file("big", tmp_path / "file")
    assert uploads(s3, store) == []
    assert list(store.list()) == []


def test_more_than_a_page_is_listed(proxy: FaultyProxy, s3_uri: str) -> None:
    store = S3Store(s3_uri)
    names = [f"many/{number:05d}" for number in range(1003)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put_bytes(name, b""), names))
    before = len(proxy.requests)
    proxy.next("", "503", "truncate")
    assert list(store.list("many/")) == names
    assert len(proxy.requests) - before == 2 + 2


def test_a_killed_upload_leaves_nothing_to_be_seen(
    store: S3Store, proxy: FaultyProxy, s3: S3Server, tmp_path: Path
) -> None:
    store.put_bytes("big", b"old")
    (tmp_path / "file").write_bytes(pattern(64 * MIB))
    # The last part never gets there: the process is in the middle of the upload when it is killed.
    proxy.hang_s = 30.0
    proxy.next("timeout", when=lambda method, path: "partNumber=4" in path)
    code = (
        "import sys; from pathlib import Path; from orchestrator.storage.s3 import S3Store\n"
        f"S3Store({store.uri!r}).put_file('big', Path({str(tmp_path / 'file')!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        until = time.monotonic() + 60
        while not any("partNumber=4" in path for _, path in proxy.requests) and time.monotonic() < until:
            time.sleep(0.05)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert uploads(s3, store), "it was killed before it began"
    assert store.get_bytes("big") == b"old"
    assert list(store.list()) == ["big"]

    assert store.abort_abandoned() == 0, "it may still be somebody's"
    assert S3Store(f"{store.uri}-other").abort_abandoned(older_than_s=0) == 0
    assert store.abort_abandoned(older_than_s=0) == 1
    assert uploads(s3, store) == []


def uploads(s3: S3Server, store: S3Store) -> list[str]:
    found = s3.client().list_multipart_uploads(Bucket=store.bucket).get("Uploads", [])
    return [upload["Key"] for upload in found if store.uri.endswith(upload["Key"].partition("/")[0])]


def test_a_forked_child_talks_over_connections_of_its_own(store: S3Store) -> None:
    contents = {f"object-{number}": bytes([number]) * 200_000 for number in range(8)}
    for name, data in contents.items():
        store.put_bytes(name, data)
    child = os.fork()
    # Both at once: over one connection they would get each other's replies.
    right = all(store.get_bytes(name) == data for _ in range(8) for name, data in contents.items())
    if child == 0:
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert right


def test_a_bucket_that_does_not_exist(s3_uri: str) -> None:
    with pytest.raises(UserError, match="the bucket 'no-such-bucket' does not exist") as caught:
        S3Store("s3://no-such-bucket/prefix").check()
    assert caught.value.where == "store"
    with pytest.raises(UserError, match="does not exist"):
        S3Store("s3://no-such-bucket/prefix").put_bytes("a", b"")


def test_a_wrong_secret(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store = S3Store(s3_uri)
    for use in (
        store.check,
        lambda: store.stat("a"),
        lambda: store.put_bytes("a", b""),
        lambda: list(store.list()),
    ):
        with pytest.raises(UserError, match="refuses the secret key") as caught:
            use()
        assert caught.value.where == "store"


def test_an_unknown_access_key(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(UserError, match="does not know the access key"):
        S3Store(s3_uri).check()


def test_no_credentials_at_all(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="no credentials") as caught:
        S3Store(s3_uri).check()
    assert "AWS_PROFILE" in str(caught.value.hint)


def test_a_server_that_is_not_there(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(UserError, match="does not answer") as caught:
        S3Store(s3_uri).check()
    assert time.monotonic() - started < 60
    assert caught.value.where == "store"
    assert "AWS_ENDPOINT_URL" in str(caught.value.hint)


@pytest.mark.parametrize("address", ["nonsense", "http://", "http://user:hush@127.0.0.1:1"])
def test_an_endpoint_that_is_none(s3_uri: str, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(UserError) as caught:
        S3Store(s3_uri).check()
    assert caught.value.where == "store"
    assert "hush" not in str(caught.value)


def test_a_profile_that_does_not_exist(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    with pytest.raises(UserError, match="nobodys"):
        S3Store(s3_uri).check()


@pytest.mark.parametrize(
    "uri",
    [
        "s3://user:hush@bucket/p",
        "s3://hush@bucket",
        "s3://",
        "s3:///p",
        "s3://Bu_cket/p",
        "s3://b/../c",
        "s3://bkt/p?q=1",
    ],
)
def test_addresses_that_are_none(uri: str) -> None:
    with pytest.raises(UserError) as caught:
        open_store(uri)
    assert caught.value.where == "store"
    assert "hush" not in str(caught.value)


def test_one_bucket_on_two_servers_is_two_caches(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = S3Store(s3_uri).root
    assert S3Store(s3_uri + "/").root == here
    assert S3Store(s3_uri + "/more").root != here
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://other:9000")
    assert S3Store(s3_uri).root != here


def test_no_log_line_holds_a_secret(
    s3: S3Server,
    store: S3Store,
    proxy: FaultyProxy,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Also for a user who wants to see everything.
    for name in (
        "",
        "botocore",
        "botocore.auth",
        "botocore.endpoint",
        "s3transfer",
        "urllib3",
        "orchestrator",
    ):
        caplog.set_level(logging.DEBUG, logger=name)
    (tmp_path / "file").write_bytes(pattern(20 * MIB))
    proxy.next("500", "drop", "lost", "truncate")
    store.put_file("big", tmp_path / "file")
    store.get_file("big", tmp_path / "copy")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-very-secret-token")
    with pytest.raises(UserError) as caught:
        S3Store(store.uri).check()
    assert any(record.name.startswith("botocore.") for record in caplog.records), "nothing was looked at"
    for record in caplog.records:
        text = f"{record.getMessage()} {record.exc_text or ''} {record.args}"
        assert s3.secret_key not in text, record.name
        assert "a-very-secret-token" not in text, record.name
    assert s3.secret_key not in str(caught.value)
    assert "a-very-secret-token" not in str(caught.value)
