"""Contenders that move one store operation at a time, in whatever order a test says; some die on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.storage.store import Stat


class Crash(BaseException):
    """The contender is dead: nothing it would still do to the store happens."""


class MemoryStore:
    """Objects in memory. `turn` is called before every operation, and in the middle of a listing.

    A listing shows what was there all the while; of what came or went meanwhile every other object.
    """

    uri = "memory:"
    remote = False

    def __init__(self, objects: dict[str, bytes], turn: Callable[[], None] = lambda: None) -> None:
        self.objects = objects
        self._turn = turn

    def put_bytes(self, name: str, data: bytes) -> None:
        self._turn()
        self.objects[name] = data

    def get_bytes(self, name: str) -> bytes:
        self._turn()
        if name not in self.objects:
            raise FileNotFoundError(name)
        return self.objects[name]

    def list(self, prefix: str = "") -> Iterator[str]:
        self._turn()
        before = {name for name in self.objects if name.startswith(prefix)}
        self._turn()
        after = {name for name in self.objects if name.startswith(prefix)}
        unsure = sorted(before ^ after)[::2]
        return iter(sorted((before & after) | set(unsure)))

    def delete(self, name: str) -> None:
        self._turn()
        self.objects.pop(name, None)

    def stat(self, name: str) -> Stat | None:
        self._turn()
        return Stat(len(self.objects[name]), 0.0) if name in self.objects else None

    def put_file(self, name: str, source: Path, *, consume: bool = False) -> None:
        raise NotImplementedError

    def get_file(self, name: str, target: Path) -> None:
        raise NotImplementedError

    def local(self, prefix: str) -> Path:
        raise NotImplementedError

    def scratch(self, label: str) -> Path:
        raise NotImplementedError


class Actor:
    """One contender: a thread that only runs while the scheduler lets it, up to its next operation."""

    def __init__(self, name: str, objects: dict[str, bytes]) -> None:
        self.name = name
        self.store = MemoryStore(objects, self.turn)
        self.crashed = False
        self.error: BaseException | None = None
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self._thread: threading.Thread | None = None

    def begin(self, body: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=self._run, args=(body,), daemon=True)
        self._thread.start()
        self._back.acquire()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def step(self) -> None:
        """Let it do one operation."""
        self._go.release()
        self._back.acquire()
        if not self.running_body and self._thread is not None:
            self._thread.join()

    def crash(self) -> None:
        """Let it die where it is."""
        self.crashed = True
        self.step()

    def turn(self) -> None:
        """Called by the contender: wait until it may go on."""
        if self.crashed:
            raise Crash
        self._back.release()
        self._go.acquire()
        if self.crashed:
            raise Crash

    running_body = True

    def _run(self, body: Callable[[], None]) -> None:
        try:
            self.turn()
            body()
        except Crash:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.running_body = False
            self._back.release()
