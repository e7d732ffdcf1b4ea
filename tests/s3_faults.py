"""An S3 client that fails at the n-th request that changes something, under whatever code of this process asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import botocore.client
import pytest
from botocore.exceptions import EndpointConnectionError

from orchestrator.errors import UserError

# `refused`: one request does not get there. `lost`: it does, but its reply does not. `away`: from then on none does.
Kind = Literal["refused", "lost", "away"]
KINDS: tuple[Kind, ...] = ("refused", "lost", "away")
_CHANGES = frozenset(
    {"PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "DeleteObject",
     "AbortMultipartUpload", "CopyObject", "UploadPartCopy"}
)  # fmt: skip


class Server:
    """Counts requests that change something, and fails at one of them.

    Args:
        fail_at: the number of the one that fails, from 1.
        kind: how.

    Attributes:
        count: such requests so far.
        done: their names.
    """

    def __init__(self, fail_at: int, kind: Kind) -> None:
        self.fail_at, self.kind, self.count = fail_at, kind, 0
        self.done: list[str] = []

    @property
    def failed(self) -> bool:
        return self.fail_at <= self.count

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put it before every client of this process."""
        real = botocore.client.BaseClient._make_api_call

        def call(client: Any, operation: str, arguments: Any) -> Any:
            if operation not in _CHANGES:
                return real(client, operation, arguments)
            self.count += 1
            self.done.append(operation)
            fails = self.count == self.fail_at or (self.kind == "away" and self.failed)
            answer = None if fails and self.kind != "lost" else real(client, operation, arguments)
            if fails:
                raise EndpointConnectionError(endpoint_url="http://store.invalid")
            return answer

        patch.setattr(botocore.client.BaseClient, "_make_api_call", call)


def every_fault(kind: Kind, at_least: int) -> Iterator[Server]:
    """Servers that fail at the first change, the second, and so on, until one gets through without."""
    number = 0
    while True:
        number += 1
        server = Server(number, kind)
        yield server
        if not server.failed:
            break
    assert server.count >= at_least, server.done


def goes_through(server: Server, operation: Callable[[], object]) -> bool:
    """Do something in the store; whether it got through. Errors that are none of a store's pass through."""
    with pytest.MonkeyPatch.context() as patch:
        server.install(patch)
        try:
            operation()
        except (OSError, UserError):
            assert server.failed
            return False
    return True
