"""Blocks loaded in processes of their own: Python's lock of one process is no limit then.

A worker asks each process for one block at a time, over a socket. Its pixels come through memory that both have mapped;
they are copied once. The processes import what makes the blocks, and nothing of the model. They end with their worker:
its end of the socket closes then, however it dies.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import queue
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.blocks import Block, BlockSource, ReportsTroubles

_LENGTH = struct.Struct("<Q")
_END_S = 10.0
# Arrays begin at multiples of this in the shared memory.
_ALIGNED = 64


class LoaderProcessError(RuntimeError):
    """A process that loads blocks is gone, or raised what cannot be sent."""


@dataclass(frozen=True)
class _Array:
    """Where an array of a block lies in the shared memory."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int


class ProcessBlocks:
    """A source of blocks that other processes load; as many are started as threads ask at once.

    Args:
        make: makes the source in each process; it is pickled.
        num_blocks: blocks of a step.
    """

    parallel: ClassVar[bool] = True

    def __init__(self, make: Callable[[], BlockSource], num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._make = make
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._all: list[_Process] = []
        self._troubles: list[str] = []
        self._reported: set[str] = set()
        self._lock = threading.Lock()
        self._is_retired = False

    def start(self, count: int) -> None:
        """Have so many processes ready, which takes them a second or two; they start at the same time."""
        made = [self._new() for _ in range(count - len(self._all))]
        for process in made:
            process.wait_until_ready()
            self._idle.put(process)

    def load(self, step: int, index: int) -> Block:
        """The block, by a process that is idle.

        Raises:
            LoaderProcessError: the process has ended.
            Exception: what the source raised.
        """
        process = self._borrowed()
        try:
            block, troubles = process.load(step, index)
        finally:
            self._give_back(process)
        with self._lock:
            # Each process says once what it met.
            self._troubles += [what for what in troubles if what not in self._reported]
            self._reported.update(troubles)
        return block

    def pop_troubles(self) -> list[str]:
        """What was met since the last call, each once, whichever process met it."""
        with self._lock:
            taken, self._troubles = self._troubles, []
        return taken

    def paths(self, rows: Iterable[int]) -> list[str]:
        """Where these rows' files are, or which rows they are if the source does not say."""
        process = self._borrowed()
        try:
            return process.paths([int(row) for row in rows])
        finally:
            self._give_back(process)

    def retire(self) -> None:
        """End the processes that load nothing now, and the others as soon as they have loaded their block."""
        with self._lock:
            self._is_retired = True
            idle = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
            self._all = [process for process in self._all if process not in idle]
        for process in idle:
            process.end()

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            processes, self._all = self._all, []
        self._idle = queue.LifoQueue()
        for process in processes:
            process.end()

    def _new(self) -> _Process:
        process = _Process(pickle.dumps(self._make))
        with self._lock:
            self._all.append(process)
        return process

    def _borrowed(self) -> _Process:
        try:
            with self._lock:
                return self._idle.get_nowait()
        except queue.Empty:
            process = self._new()
            process.wait_until_ready()
            return process

    def _give_back(self, process: _Process) -> None:
        with self._lock:
            if not self._is_retired:
                self._idle.put(process)
                return
            # It may be closed already.
            self._all = [one for one in self._all if one is not process]
        process.end()


class _Process:
    """One process, as its worker sees it. One thread at a time uses it."""

    def __init__(self, make: bytes) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.training.loader_process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                # What this process can import, that one can; and it computes no model.
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "OMP_NUM_THREADS": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                },
            )
        self._shared: mmap.mmap | None = None
        with self._explained():
            _send(self._socket, make)

    def wait_until_ready(self) -> None:
        self._answer()

    def load(self, step: int, index: int) -> tuple[Block, list[str]]:
        self._request(("load", step, index))
        block, arrays, troubles = self._answer()
        return self._filled(block, arrays), troubles

    def paths(self, rows: list[int]) -> list[str]:
        self._request(("paths", rows))
        found: list[str] = self._answer()
        return found

    def end(self) -> None:
        self._socket.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _filled(self, block: Block, arrays: list[_Array]) -> Block:
        assert self._shared is not None
        for one in arrays:
            kind = np.dtype(one.kind)
            count = int(np.prod(one.shape, dtype=np.int64))
            there: NDArray[Any] = np.frombuffer(self._shared, kind, count, one.start).reshape(one.shape)
            # The process writes its next block to the same place.
            block.arrays[one.name] = there.copy()
        return block

    def _request(self, what: object) -> None:
        with self._explained():
            _send(self._socket, pickle.dumps(what))

    def _answer(self) -> Any:
        with self._explained():
            data, descriptors = _received(self._socket)
        if descriptors:
            self._shared = mmap.mmap(descriptors[0], 0, prot=mmap.PROT_READ)
            os.close(descriptors[0])
        answer, error = pickle.loads(data)
        if error is not None:
            raise error
        return answer

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)
            code = self._process.returncode
            how = f"by signal {-code}" if code is not None and code < 0 else f"with {code}"
            raise LoaderProcessError(f"a process that loads blocks ended {how}") from error


# --- in the process ---------------------------------------------------------------------------------------------


class _Memory:
    """Memory that the worker has mapped, too. It is not a file of a file system, whose size may be limited."""

    def __init__(self) -> None:
        self._mapped: mmap.mmap | None = None

    def put(self, arrays: Mapping[str, NDArray[Any]]) -> tuple[list[_Array], int | None]:
        """Where each array went, and the descriptor of the memory if it is a new one."""
        placed, end = [], 0
        for name, array in arrays.items():
            placed.append(_Array(name, array.dtype.str, array.shape, end))
            end += -(-array.nbytes // _ALIGNED) * _ALIGNED
        descriptor = None
        if self._mapped is None or len(self._mapped) < end:
            descriptor = _anonymous_file(max(end, _ALIGNED))
            self._mapped = mmap.mmap(descriptor, 0)
        for one, array in zip(placed, arrays.values(), strict=True):
            there = np.frombuffer(self._mapped, array.dtype, array.size, one.start)
            there[:] = array.reshape(-1)
        return placed, descriptor


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("blocks")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def _serve(connection: socket.socket) -> None:
    """Make the source, then answer until the worker closes its end."""
    import cv2

    cv2.setNumThreads(1)
    memory = _Memory()
    try:
        source: BlockSource = pickle.loads(_received(connection)[0])()
    except Exception as error:
        _reply(connection, error=error)
        return
    _reply(connection)
    while True:
        question, *arguments = pickle.loads(_received(connection)[0])
        try:
            if question == "paths":
                (rows,) = arguments
                reports = isinstance(source, ReportsTroubles)
                found = source.paths(rows) if reports else [f"row {row}" for row in rows]  # type: ignore[attr-defined]
                _reply(connection, found)
                continue
            block = source.load(*arguments)
            troubles = source.pop_troubles() if isinstance(source, ReportsTroubles) else []
            placed, descriptor = memory.put(block.arrays)
            block.arrays.clear()
        except Exception as error:
            _reply(connection, error=error)
        else:
            _reply(connection, (block, placed, troubles), descriptor)


def _reply(
    connection: socket.socket,
    answer: object = None,
    descriptor: int | None = None,
    error: Exception | None = None,
) -> None:
    try:
        data = pickle.dumps((answer, error))
        pickle.loads(data)
    except Exception:
        assert error is not None
        told = "".join(traceback.format_exception(error))
        data = pickle.dumps((None, LoaderProcessError(f"a process that loads blocks raised\n{told}")))
    _send(connection, data, descriptor)


def _send(connection: socket.socket, data: bytes, descriptor: int | None = None) -> None:
    if descriptor is None:
        connection.sendall(_LENGTH.pack(len(data)))
    else:
        socket.send_fds(connection, [_LENGTH.pack(len(data))], [descriptor])
        os.close(descriptor)
    connection.sendall(data)


def _received(connection: socket.socket) -> tuple[bytes, list[int]]:
    """One message. Raises EOFError where the other end is closed."""
    start, descriptors, *_ = socket.recv_fds(connection, _LENGTH.size, 1)
    start += _exactly(connection, _LENGTH.size - len(start)) if start else b""
    if not start:
        raise EOFError
    return _exactly(connection, _LENGTH.unpack(start)[0]), descriptors


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def main(descriptor: int) -> None:
    """What the process does: until its worker is gone."""
    with (
        socket.socket(fileno=descriptor) as connection,
        contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError),
    ):
        _serve(connection)


if __name__ == "__main__":
    # Under its own name, so that what is pickled here is known there.
    from orchestrator.training import loader_process

    loader_process.main(int(sys.argv[1]))
