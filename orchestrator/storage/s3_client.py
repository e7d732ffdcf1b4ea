"""What is peculiar to S3: the client, its patience, and its errors in plain words. Imports boto3 lazily."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from orchestrator.errors import UserError

# These log whole requests and replies: session tokens, and the secrets that a token service hands out.
_TELLTALE = ("auth", "awsrequest", "credentials", "endpoint", "handlers", "parsers", "tokens", "utils")
_CONNECTIONS = 16

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
_log = logging.getLogger(__name__)


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

    def watch(parsed: dict[str, Any], **_: Any) -> None:
        if "Body" in parsed:
            parsed["Body"] = _WatchedBody(parsed["Body"], patience)

    client.meta.events.register("after-call.s3.GetObject", watch)
    return client


class _WatchedBody:
    """The body of a reply; one that crawls counts as broken off, so that its part is asked for again.

    botocore's own time limit is for each packet, and a server that sends one byte at a time keeps it for hours.
    """

    def __init__(self, body: Any, patience: Patience) -> None:
        self._body, self._patience = body, patience
        self._began, self._got = time.monotonic(), 0

    def read(self, amount: int | None = None) -> bytes:
        """The next bytes, as `StreamingBody.read`.

        Raises:
            ReadTimeoutError: (botocore's) the bytes came too slowly so far.
        """
        chunk: bytes = self._body.read(amount)
        self._got += len(chunk)
        took = time.monotonic() - self._began
        if took > self._patience.read_s + self._got / self._patience.slowest:
            from botocore.exceptions import ReadTimeoutError

            raise ReadTimeoutError(endpoint_url=f"only {self._got} bytes in {took:.0f} s")
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
