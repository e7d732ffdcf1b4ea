"""What is peculiar to S3: the client, its patience, and its errors in plain words. Imports boto3 lazily."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import UserError

# These log whole requests and replies: session tokens, and the secrets that a token service hands out.
_TELLTALE = ("auth", "awsrequest", "credentials", "endpoint", "handlers", "parsers", "tokens", "utils")
_CONNECTIONS = 16
_LONGEST_PAUSE_S = 20.0
# Where the context of a request has the part of the object that was asked for.
_PART = "orchestrator_part"
_sleep = time.sleep

_CHAIN = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the machine a role"
_RIGHTS = "allow it to list the bucket and to get, put and delete objects below the prefix (docs/s3.md)"
_REASONS = {
    "NoSuchBucket": ("the bucket {bucket!r} does not exist", "create the bucket, or correct `store`"),
    "InvalidBucketName": ("the server rejects {bucket!r} as the name of a bucket", "correct `store`"),
    "SignatureDoesNotMatch": (
        "the server refuses the secret key",
        "check AWS_SECRET_ACCESS_KEY or the profile",
    ),
    "InvalidAccessKeyId": (
        "the server does not know the access key",
        "check AWS_ACCESS_KEY_ID or the profile",
    ),
    "ExpiredToken": ("the credentials have expired", "get new ones and run again"),
    "ExpiredTokenException": ("the credentials have expired", "get new ones and run again"),
    "TokenRefreshRequired": ("the credentials have expired", "get new ones and run again"),
    "InvalidToken": ("the server refuses the session token", "check AWS_SESSION_TOKEN or the profile"),
    "InvalidTokenId": ("the server refuses the session token", "check AWS_SESSION_TOKEN or the profile"),
    "AccessDenied": ("access to {bucket!r} is denied to these credentials", _RIGHTS),
    "AllAccessDisabled": ("access to {bucket!r} is denied to these credentials", _RIGHTS),
    "403": ("access to {bucket!r} is denied to these credentials", _RIGHTS),
    "RequestTimeTooSkewed": ("this machine's clock differs too much from the server's", "set the clock"),
    "PermanentRedirect": ("the bucket {bucket!r} is in another region", "set AWS_DEFAULT_REGION"),
    "301": ("the bucket {bucket!r} is in another region", "set AWS_DEFAULT_REGION"),
    "AuthorizationHeaderMalformed": ("the bucket {bucket!r} is in another region", "set AWS_DEFAULT_REGION"),
}
_NO_COPIES = ("AccessDenied", "AllAccessDisabled", "403", "NotImplemented", "MethodNotAllowed", "405", "501")


class StoreError(OSError):
    """The store did not do what it was asked, after all tries: it is away, full, or damaged."""


@dataclass(frozen=True)
class Patience:
    """How long to put up with a server.

    Attributes:
        connect_s: for a connection, and for each piece of a request to leave.
        read_s: for the next bytes of a reply.
        attempts: tries of one request, with pauses that grow to 20 s; and of one part whose reply breaks off.
        slowest: bytes a second below which a reply counts as broken off.
    """

    connect_s: float = 10.0
    read_s: float = 30.0
    attempts: int = 10
    slowest: float = 16384.0


def endpoint() -> str | None:
    """The server's address if it is not AWS: from the standard variables."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def make_client(patience: Patience) -> Any:
    """A boto3 client of its own session. Credentials, region and endpoint come from boto3's standard chain.

    Raises:
        UserError: the endpoint holds credentials.
    """
    import boto3
    import botocore.session
    from botocore.config import Config

    address = endpoint()
    if address and "@" in urlsplit(address).netloc:
        raise _mistake("AWS_ENDPOINT_URL contains credentials", _CHAIN)
    _hush()
    core = botocore.session.Session()
    chosen: Any = core.get_scoped_config().get("s3")
    styled = isinstance(chosen, dict) and "addressing_style" in chosen
    config = Config(
        connect_timeout=patience.connect_s,
        read_timeout=patience.read_s,
        retries={"mode": "standard", "total_max_attempts": patience.attempts},
        max_pool_connections=_CONNECTIONS,
        # Many servers do not know AWS's newer checksums. What matters has its sha256 in a manifest.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # Few servers other than AWS's own have a DNS name for every bucket.
        s3={"addressing_style": "path"} if address and not styled else None,
    )
    client = boto3.session.Session(botocore_session=core).client("s3", config=config)

    breaks = _Breaks(patience)

    def remember(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
        context[_PART] = str([params.get(name) for name in ("Bucket", "Key", "Range")])

    def watch(http_response: Any, parsed: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
        if "Body" in parsed:
            http_response.raw.read = _WatchedStream(http_response.raw, patience).read
            parsed["Body"] = _PausingBody(parsed["Body"], context.get(_PART, ""), breaks)

    client.meta.events.register("before-parameter-build.s3.GetObject", remember)
    client.meta.events.register("after-call.s3.GetObject", watch)
    return client


class _WatchedStream:
    """The bytes of a reply; one that crawls counts as broken off, so that its part is asked for again.

    botocore's own time limit is for each packet, and a server that sends one byte at a time keeps it for hours.

    Args:
        raw: urllib3's response.
    """

    def __init__(self, raw: Any, patience: Patience) -> None:
        self._patience = patience
        # What has come so far, rather than as much as was asked for. urllib3 before 2.1 has no such method.
        self._read_some: Callable[[int | None], bytes | None] = getattr(raw, "read1", raw.read)
        self._began, self._got = time.monotonic(), 0

    def read(self, amount: int | None = None) -> bytes:
        """The next bytes: so many unless the reply ends, or all.

        Raises:
            ReadTimeoutError: (botocore's) the bytes came too slowly so far.
        """
        pieces: list[bytes] = []
        left = amount
        while left is None or left > 0:
            piece = self._read_some(left)
            if not piece:
                break
            pieces.append(piece)
            left = None if left is None else left - len(piece)
            self._got += len(piece)
            took = time.monotonic() - self._began
            if took > self._patience.read_s + self._got / self._patience.slowest:
                from botocore.exceptions import ReadTimeoutError

                raise ReadTimeoutError(endpoint_url=f"only {self._got} bytes in {took:.0f} s")
        return b"".join(pieces)


class _Breaks:
    """How often the replies to each request for a part have broken off in a row, and the pauses before the next."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._counts: dict[str, int] = {}

    def broke_off(self, part: str) -> None:
        """Waits: a proxy that restarts is given the time for it. s3transfer itself asks again at once."""
        failures = self._counts.get(part, 0) + 1
        if failures >= self._patience.attempts:
            self._counts.pop(part, None)
            return
        self._counts[part] = failures
        _sleep(random.uniform(0.5, 1.0) * min(2.0 ** (failures - 1), _LONGEST_PAUSE_S))

    def ended(self, part: str) -> None:
        """The reply came as a whole."""
        self._counts.pop(part, None)


class _PausingBody:
    """The body of a reply. Where it breaks off, it pauses before it says so.

    Args:
        body: botocore's.
        part: what was asked for.
    """

    def __init__(self, body: Any, part: str, breaks: _Breaks) -> None:
        self._body, self._part, self._breaks = body, part, breaks

    def read(self, amount: int | None = None) -> bytes:
        """The next bytes, as `StreamingBody.read`.

        Raises:
            BotoCoreError, HTTPClientError: the reply broke off, or came too slowly.
        """
        try:
            chunk: bytes = self._body.read(amount)
        except Exception:
            self._breaks.broke_off(self._part)
            raise
        if not chunk or amount is None:
            self._breaks.ended(self._part)
        return chunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._body, name)


@contextlib.contextmanager
def plain_errors(bucket: str, what: str) -> Iterator[None]:
    """Turns botocore's errors into those of a :class:`Store`.

    Args:
        bucket: for messages.
        what: what was being done, for messages.

    Raises:
        FileNotFoundError: no such object.
        UserError: the bucket or the credentials are wrong, or the settings of boto3.
        StoreError: anything else that the server or the network did.
    """
    from botocore import exceptions as boto
    from s3transfer import exceptions as transfer

    try:
        yield
    except boto.ClientError as error:
        raise _of_reply(error, bucket, what) from None
    except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError) as error:
        raise _mistake(f"there are no credentials for the bucket {bucket!r}: {error}", _CHAIN) from None
    except (boto.ConfigNotFound, boto.ProfileNotFound, boto.ConfigParseError) as error:
        raise _mistake(
            f"the settings for S3 cannot be read: {error}", "correct AWS_PROFILE or the file"
        ) from None
    except boto.ParamValidationError as error:
        raise _mistake(f"{bucket!r} cannot be used: {error}", "correct `store`") from None
    except transfer.RetriesExceededError as error:
        raise StoreError(
            f"the store could not {what}: its replies keep breaking off: {error.last_exception}"
        ) from error
    except transfer.S3DownloadFailedError as error:
        raise StoreError(f"the store could not {what}: it was replaced again and again") from error
    except (boto.BotoCoreError, boto.HTTPClientError, transfer.S3ValidationError) as error:
        raise StoreError(f"the store could not {what}: {error}") from error
    except ValueError as error:
        if "endpoint" not in str(error).lower():
            raise
        raise _mistake(
            f"the address of the server cannot be used: {error}", "correct AWS_ENDPOINT_URL"
        ) from None


def code_of(error: Exception) -> str:
    """The code of a ClientError, such as `NoSuchKey` or `404`."""
    reply: dict[str, Any] = getattr(error, "response", {})
    return str(reply.get("Error", {}).get("Code", ""))


def does_not_copy(error: Exception) -> bool:
    """Whether a ClientError says that the server has no copies, or that these credentials may not make any."""
    reply: dict[str, Any] = getattr(error, "response", {})
    status = reply.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return code_of(error) in _NO_COPIES or status in (405, 501)


def _of_reply(error: Exception, bucket: str, what: str) -> Exception:
    code = code_of(error)
    if code in ("NoSuchKey", "404", "NotFound"):
        return FileNotFoundError(2, "no such object", what)
    if code in _REASONS:
        reason, hint = _REASONS[code]
        return _mistake(reason.format(bucket=bucket), hint)
    return StoreError(f"the store could not {what}: {error}")


def _mistake(what: str, hint: str) -> UserError:
    return UserError(what, where="store", hint=hint)


def unreachable(bucket: str, error: BaseException) -> UserError:
    """For the first request of all: then it is the settings that are wrong, rather than the weather."""
    return _mistake(f"the server of the bucket {bucket!r} does not answer: {error}", "check AWS_ENDPOINT_URL")


def _hush() -> None:
    for name in _TELLTALE:
        logger = logging.getLogger(f"botocore.{name}")
        if _above_debug not in logger.filters:
            logger.addFilter(_above_debug)


def _above_debug(record: logging.LogRecord) -> bool:
    return record.levelno > logging.DEBUG
