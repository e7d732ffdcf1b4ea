"""Framed messages between a slot, its fork server and its worker: JSON, bytes, and a file descriptor.

Both ends are processes of one user on one machine, made by each other; nothing here listens on an address.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HEADER = struct.Struct(">IQ")
_ALIGN = 64


@dataclass(frozen=True)
class Message:
    """What was sent: `body` and, if there were any, `payload` and `fd` (the receiver's to close)."""

    body: dict[str, Any]
    payload: bytes = b""
    fd: int | None = None


class Channel:
    """One end of a connected Unix stream socket. Sending is thread-safe; one thread may receive."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._sending = threading.Lock()

    @staticmethod
    def pair() -> tuple[Channel, Channel]:
        """Two connected ends."""
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return Channel(left), Channel(right)

    @staticmethod
    def of(fd: int) -> Channel:
        """The end behind an inherited or received descriptor."""
        return Channel(socket.socket(fileno=fd))

    def send(self, body: Mapping[str, Any], payload: bytes = b"", fd: int | None = None) -> None:
        """Send one message.

        Raises:
            OSError: the other end is gone.
        """
        text = json.dumps(body).encode()
        head = _HEADER.pack(len(text), len(payload))
        with self._sending:
            if fd is None:
                self.socket.sendall(head)
            else:
                socket.send_fds(self.socket, [head], [fd])
            self.socket.sendall(text)
            if payload:
                self.socket.sendall(payload)

    def receive(self) -> Message | None:
        """The next message; None once the other end is gone."""
        try:
            head, fds, _, _ = socket.recv_fds(self.socket, _HEADER.size, 1)
            if head and len(head) < _HEADER.size:
                head += self._exactly(_HEADER.size - len(head))
            if not head:
                return None
            text, payload = _HEADER.unpack(head)
            body = json.loads(self._exactly(text))
            return Message(body, self._exactly(payload), fds[0] if fds else None)
        except (OSError, EOFError):
            return None

    def close(self) -> None:
        """End the connection, also for a thread that is receiving."""
        with suppress(OSError):  # the other end was faster
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def close_here(self) -> None:
        """Close this process's copy; the connection lives on in the process that inherited it."""
        self.socket.close()

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self.socket.recv(min(size - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)


def pack(arrays: Mapping[str, NDArray[Any]]) -> tuple[int, dict[str, Any]]:
    """Arrays in anonymous shared memory that no kill can leak: a descriptor (the caller's to close) and a layout."""
    layout: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        layout[name] = {"offset": end, "shape": array.shape, "dtype": array.dtype.str}
        end += -(-array.nbytes // _ALIGN) * _ALIGN
    fd = os.memfd_create("block")
    os.ftruncate(fd, max(end, 1))
    with mmap.mmap(fd, max(end, 1)) as memory:
        for name, array in arrays.items():
            view = np.frombuffer(memory, np.uint8, array.nbytes, layout[name]["offset"])
            view[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            del view
    return fd, layout


def unpack(fd: int, layout: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays of :func:`pack`, mapped privately and writable; closes `fd`."""
    try:
        memory = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE)
    finally:
        os.close(fd)
    arrays = {}
    for name, entry in layout.items():
        dtype = np.dtype(entry["dtype"])
        count = int(np.prod(entry["shape"], dtype=np.int64))
        arrays[name] = np.frombuffer(memory, dtype, count, entry["offset"]).reshape(entry["shape"])
    return arrays
