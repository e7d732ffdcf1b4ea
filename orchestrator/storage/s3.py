"""A store in an S3 bucket. It asks for nothing but puts, gets, copies, lists and deletes of objects."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from orchestrator.errors import UserError
from orchestrator.fsio import replacing
from orchestrator.storage.cache_folder import cache_folder
from orchestrator.storage.s3_client import (
    Patience,
    StoreError,
    code_of,
    does_not_copy,
    endpoint,
    make_client,
    plain_errors,
    unreachable,
)
from orchestrator.storage.scratch import Scratch
from orchestrator.storage.store import SCRATCH, CannotCopyError, Stat, parts_of, usable

PART = 16 * 2**20
# A server has to answer within `Patience.read_s`, even one that shares 100 MB/s among all parts copied at once.
COPIED_PART = 64 * 2**20
THREADS = 4
_CHUNK = 65536
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]")
_AGAIN = 3
_PAGE = 1000
_ABANDONED_S = 24 * 3600.0
_log = logging.getLogger(__name__)


class S3Store:
    """Objects below a prefix of a bucket. Making one connects to nothing; every use may raise as below.

    botocore tries requests again, and boto3's managed transfer the parts of a download whose replies break off. Safe
    to use from several threads, to pickle, and to keep over a fork.

    Args:
        uri: `s3://bucket/prefix`.
        patience: how long to put up with the server.

    Raises:
        UserError: the address, the bucket or the credentials are wrong.
        StoreError: (an OSError) the server cannot be reached or refuses, after all tries.
    """

    remote = True

    def __init__(self, uri: str, patience: Patience | None = None) -> None:
        self.bucket, self._prefix = _parse(uri)
        self.uri = f"s3://{self.bucket}/{self._prefix}".rstrip("/")
        self._patience = patience or Patience()
        # The same bucket name on two servers is two stores.
        name = hashlib.sha256(f"{endpoint() or ''}\n{self.uri}".encode()).hexdigest()[:16]
        self.root = cache_folder() / "stores" / name
        self._scratch: Scratch | None = None
        self._made: tuple[int, Any] | None = None

    def __reduce__(self) -> tuple[type[S3Store], tuple[str, Patience]]:
        # Connections belong to one process: a copy elsewhere makes its own.
        return S3Store, (self.uri, self._patience)

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def check(self) -> None:
        """One request, with little patience: whether the settings work at all.

        Raises:
            UserError: as for the class, and when the server does not answer.
        """
        try:
            with plain_errors(self.bucket, "be listed"):
                client = make_client(Patience(connect_s=5.0, read_s=10.0, attempts=2))
                client.list_objects_v2(Bucket=self.bucket, Prefix=self._prefix, MaxKeys=1)
        except StoreError as error:
            raise unreachable(self.bucket, error.__cause__ or error) from None

    def put_bytes(self, name: str, data: bytes) -> None:
        """See :class:`Store`."""
        key = self._key(name)
        with self._using(f"take {name}") as client:
            client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def put_file(self, name: str, source: Path, *, consume: bool = False) -> None:
        """See :class:`Store`. Above 16 MiB in parts, which are given up if it fails."""
        from boto3.s3.transfer import create_transfer_manager

        key = self._key(name)

        def upload(client: Any) -> None:
            with create_transfer_manager(client, self._transfer_config()) as manager:
                manager.upload(str(source), self.bucket, key).result()

        with self._using(f"take {name}") as client:
            self._whole_upload(lambda: upload(client))
        if consume:
            source.unlink()

    def _whole_upload(self, upload: Callable[[], None]) -> None:
        from botocore.exceptions import ClientError

        for last in (False,) * (_AGAIN - 1) + (True,):
            try:
                upload()
                return
            except ClientError as error:
                # The reply to the request that completed it was lost, so botocore asked again; or it lay
                # idle for so long that somebody swept it away.
                if last or code_of(error) != "NoSuchUpload":
                    raise

    def copy(self, source: str, target: str) -> None:
        """See :class:`Store`. Above 64 MiB in parts, several at a time, which are given up if it fails."""
        from boto3.s3.transfer import create_transfer_manager
        from botocore.exceptions import ClientError

        key, where = self._key(target), {"Bucket": self.bucket, "Key": self._key(source)}

        def copy(client: Any) -> None:
            with create_transfer_manager(client, self._transfer_config(part=COPIED_PART)) as manager:
                manager.copy(where, self.bucket, key).result()

        with self._using(f"copy {source}") as client:
            try:
                self._whole_upload(lambda: copy(client))
            except ClientError as error:
                if does_not_copy(error):
                    raise CannotCopyError(f"{source} could not be copied: {error}") from None
                raise

    def get_bytes(self, name: str) -> bytes:
        """See :class:`Store`."""
        key = self._key(name)
        buffer = io.BytesIO()
        with self._using(f"give {name}") as client:
            self._download(client, key, buffer, threads=False)
        return buffer.getvalue()

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """See :class:`~orchestrator.storage.store.HasRanges`. One request, again if its reply breaks off."""
        from botocore.exceptions import BotoCoreError, HTTPClientError

        key, wanted = self._key(name), f"bytes={start}-{stop - 1}"
        with self._using(f"give {name}") as client:
            for last in (False,) * (self._patience.attempts - 1) + (True,):
                body = client.get_object(Bucket=self.bucket, Key=key, Range=wanted)["Body"]
                try:
                    return bytes(body.read())
                except (BotoCoreError, HTTPClientError):
                    if last:
                        raise
        raise AssertionError("the last try returns or raises")

    def get_file(self, name: str, target: Path) -> None:
        """See :class:`Store`. In parts of 16 MiB, several at a time."""
        key = self._key(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A copy: who reads it compares it with what it should be, or fetches it again.
        with (
            self._using(f"give {name}") as client,
            replacing(target, durable=False) as draft,
            draft.open("wb") as file,
        ):
            self._download(client, key, file)

    def list(self, prefix: str = "") -> Iterator[str]:
        """See :class:`Store`."""
        names: list[str] = []
        with self._using(f"list {prefix}") as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._prefix + prefix, PaginationConfig={"PageSize": _PAGE}
            )
            for page in pages:
                names += [item["Key"].removeprefix(self._prefix) for item in page.get("Contents", ())]
        # Consoles make empty objects that end in a slash, and not every server lists in order.
        return iter(usable([name for name in names if name and not name.endswith("/")], self.uri))

    def delete(self, name: str) -> None:
        """See :class:`Store`. One at a time: servers differ in what they ask of bulk deletes."""
        key = self._key(name)
        with contextlib.suppress(FileNotFoundError), self._using(f"delete {name}") as client:
            client.delete_object(Bucket=self.bucket, Key=key)

    def stat(self, name: str) -> Stat | None:
        """See :class:`Store`."""
        key = self._key(name)
        try:
            with self._using(f"look at {name}") as client:
                head = client.head_object(Bucket=self.bucket, Key=key)
        except FileNotFoundError:
            return None
        except UserError:
            # The reply to HEAD has no body that could say what is wrong: one to another request has.
            self.check()
            raise
        return Stat(int(head["ContentLength"]), head["LastModified"].timestamp())

    def local(self, prefix: str) -> Path:
        """See :class:`Store`: in the cache; `ArtifactStore.fetch` fills it."""
        return self.root.joinpath(*parts_of(prefix.rstrip("/")))

    def scratch(self, label: str) -> Path:
        """See :class:`Store`: in the cache."""
        if self._scratch is None:
            self._scratch = Scratch(self.root / SCRATCH)
        return self._scratch.new(label)

    def abort_abandoned(self, older_than_s: float = _ABANDONED_S) -> int:
        """Give up multipart uploads below the prefix that dead processes left; returns how many. Best effort.

        They are invisible, but paid for. A lifecycle rule of the bucket does this better.
        """
        count = 0
        try:
            with self._using("list uploads") as client:
                pages = client.get_paginator("list_multipart_uploads").paginate(
                    Bucket=self.bucket, Prefix=self._prefix
                )
                for upload in (upload for page in pages for upload in page.get("Uploads", ())):
                    if time.time() - upload["Initiated"].timestamp() >= older_than_s:
                        client.abort_multipart_upload(
                            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
                        count += 1
        except (OSError, UserError) as error:
            _log.debug("abandoned uploads stay: %s", error)
        return count

    def _download(self, client: Any, key: str, file: BinaryIO, *, threads: bool = True) -> None:
        """The whole object into an empty file. Anew if the object is replaced while it is read."""
        from s3transfer.exceptions import S3DownloadFailedError

        for last in (False,) * (_AGAIN - 1) + (True,):
            try:
                client.download_fileobj(self.bucket, key, file, Config=self._transfer_config(threads=threads))
                return
            except S3DownloadFailedError:
                # All parts ask for the version that the first one had.
                if last:
                    raise
            file.seek(0)
            file.truncate()

    def _transfer_config(self, *, threads: bool = True, part: int | None = None) -> Any:
        from boto3.s3.transfer import TransferConfig

        return TransferConfig(
            multipart_threshold=part or PART,
            multipart_chunksize=part or PART,
            max_concurrency=THREADS,
            num_download_attempts=self._patience.attempts,
            io_chunksize=_CHUNK,
            use_threads=threads,
            # The other client, where it is installed, has its own connections, retries and time limits.
            preferred_transfer_client="classic",
        )

    @contextlib.contextmanager
    def _using(self, what: str) -> Iterator[Any]:
        with plain_errors(self.bucket, what):
            # A client made before a fork shares its connections with the parent. Two threads may make one
            # each at first; the loser's is used once.
            if self._made is None or self._made[0] != os.getpid():
                self._made = os.getpid(), make_client(self._patience)
            yield self._made[1]

    def _key(self, name: str) -> str:
        return self._prefix + "/".join(parts_of(name))


def _parse(uri: str) -> tuple[str, str]:
    """The bucket, and the prefix with a slash at its end or empty. Never quotes what might be a secret."""
    parts = urlsplit(uri)
    mistake = None
    if "@" in parts.netloc:
        mistake = "the address of a store must not contain credentials"
    elif parts.query or parts.fragment:
        mistake = f"? and # are not allowed in the address of a store: s3://{parts.netloc}{parts.path}"
    elif not _BUCKET.fullmatch(parts.netloc):
        mistake = f"{parts.netloc!r} is not a valid bucket name"
    elif ".." in parts.path.split("/"):
        mistake = f"`..` is not allowed in the address of a store: {uri}"
    if mistake:
        raise UserError(mistake, where="store", hint="write s3://bucket/prefix")
    prefix = "/".join(part for part in parts.path.split("/") if part)
    return parts.netloc, f"{prefix}/" if prefix else ""
