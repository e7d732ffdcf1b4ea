"""Downloads that go on where they broke off. botocore tries requests again, but not the bodies of replies."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.fsio import replacing
from orchestrator.storage.s3_client import Patience, StoreError, code_of

PART = 16 * 2**20
THREADS = 4
_CHUNK = 65536
_AGAIN = 3
_LONGEST_PAUSE_S = 20.0

T = TypeVar("T")


class _BrokenOffError(Exception):
    """The body of a reply ended too early, or crawled."""


class Download:
    """One object, as often as its replies break off.

    Args:
        client: of boto3; its errors pass through.
        patience: how long to put up with the server.
    """

    def __init__(self, client: Any, bucket: str, key: str, patience: Patience) -> None:
        self._client = client
        self._what = {"Bucket": bucket, "Key": key}
        self._patience = patience

    def read(self) -> bytes:
        """The whole object.

        Raises:
            StoreError: it broke off every time.
        """

        def get() -> bytes:
            reply = self._client.get_object(**self._what)
            with _breaking_off():
                return b"".join(self._chunks(reply["Body"]))

        return self._persist(get)

    def write(self, target: Path) -> None:
        """The object as the file `target`, which appears whole or not at all. Parts come side by side.

        Raises:
            StoreError: it broke off every time, or was replaced while it was read, again and again.
        """
        from botocore.exceptions import ClientError

        target.parent.mkdir(parents=True, exist_ok=True)
        # A copy: who reads it compares it with what it should be, or fetches it again.
        with replacing(target, durable=False) as draft:
            for last in (False,) * (_AGAIN - 1) + (True,):
                try:
                    self._write_parts(draft)
                    break
                except ClientError as error:
                    if last or code_of(error) not in ("PreconditionFailed", "412"):
                        raise

    def _write_parts(self, path: Path) -> None:
        head = self._client.head_object(**self._what)
        size = int(head["ContentLength"])
        with path.open("wb") as file, ThreadPoolExecutor(THREADS) as pool:
            parts = [
                pool.submit(self._write_part, head["ETag"], file.fileno(), at, min(at + PART, size))
                for at in range(0, size, PART)
            ]
            try:
                for part in parts:
                    part.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _write_part(self, etag: str, fd: int, start: int, stop: int) -> None:
        """Bytes [start, stop) of the object to the same place of the file; `etag` tells it from its successor."""
        at = start

        def get() -> None:
            nonlocal at
            reply = self._client.get_object(**self._what, Range=f"bytes={at}-{stop - 1}", IfMatch=etag)
            if reply["ContentLength"] != stop - at:
                raise StoreError(f"the server gave {reply['ContentLength']} bytes instead of {stop - at}")
            chunks = self._chunks(reply["Body"])
            while True:
                with _breaking_off():
                    chunk = next(chunks, b"")
                if not chunk:
                    return
                at += os.pwrite(fd, chunk, at)

        self._persist(get, progress=lambda: at)

    def _chunks(self, body: Any) -> Iterator[bytes]:
        """The body in pieces; one that crawls counts as broken off."""
        began, got = time.monotonic(), 0
        with contextlib.closing(body):
            for chunk in body.iter_chunks(_CHUNK):
                yield chunk
                got += len(chunk)
                if time.monotonic() - began > self._patience.read_s + got / self._patience.slowest:
                    raise _BrokenOffError(f"only {got} bytes in {time.monotonic() - began:.0f} s")

    def _persist(self, get: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Gives up after as many breaks without any progress between them as a request has attempts."""
        failures, reached = 0, progress()
        while True:
            try:
                return get()
            except _BrokenOffError as error:
                failures = 1 if progress() > reached else failures + 1
                reached = progress()
                if failures >= self._patience.attempts:
                    raise StoreError(f"the replies of the server keep breaking off: {error}") from error
            time.sleep(random.random() * min(2.0 ** (failures - 1), _LONGEST_PAUSE_S))


@contextlib.contextmanager
def _breaking_off() -> Iterator[None]:
    from botocore.exceptions import HTTPClientError, IncompleteReadError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (HTTPClientError, IncompleteReadError, HTTPError, ConnectionError, TimeoutError) as error:
        raise _BrokenOffError(str(error)) from error
