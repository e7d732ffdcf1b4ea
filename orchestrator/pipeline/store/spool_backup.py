"""A copy of the tracking spool in the store, so that records outlive the driver's machine."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.fsio import atomic_write, make_folder
from orchestrator.names import inside, is_name
from orchestrator.pipeline.lease.lease_manager import LeaseLostError
from orchestrator.storage.store import Store

_EVERY_S = 30.0
_PIECE = 4 * 2**20
# `<file>/<piece number>`; a file is `<run>.jsonl`, `<run>.progress`, or below `<run>.files/`.
_NAME = re.compile(r"(?P<file>[A-Za-z0-9_\-]+\.(?:jsonl|progress|files/.+))/(?P<piece>\d{6,})")
_log = logging.getLogger(__name__)


class SpoolBackup:
    """Keeps the files below `folder` in the store below `prefix`.

    Records are only ever appended, so a file goes there in pieces of 4 MiB of which only the newest change:
    `<file>/<piece number>`. Files that say how far a run was sent (`.progress`) go last, as they were before the
    records: they must never be ahead of them.

    Args:
        store: remote.
        prefix: ends in a slash.
        folder: of the spool; need not exist.
        every_s: pause between rounds.

    Attributes:
        check: called before anything is sent; raises LeaseLostError if the records are another driver's by now.
    """

    def __init__(self, store: Store, prefix: str, folder: Path, *, every_s: float = _EVERY_S) -> None:
        self._store = store
        self._prefix = prefix
        self._folder = folder
        self._every_s = every_s
        self.check: Callable[[], None] = lambda: None
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._failing = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Bring back what this machine lacks, and keep the copy up to date in the background until the end.

        Raises:
            OSError: the store does not give what it has.
        """
        self.restore()
        thread = threading.Thread(target=self._loop, name="spool-backup", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            # The thread may be in the middle of a long try: flush waits for it.
            self.flush()

    def flush(self) -> bool:
        """Bring the copy up to date; False, with one warning, if the store does not take it now."""
        with self._lock:
            try:
                self.check()
                self._send_all()
            except LeaseLostError:
                return False
            except (OSError, UserError) as error:
                if not self._failing:
                    _log.warning(
                        "tracking records are kept only on this machine since %s, until the store answers; retrying "
                        "every %.0f s: %s",
                        time.strftime("%H:%M:%S"),
                        self._every_s,
                        error,
                    )
                self._failing = True
                return False
            self._failing = False
            return True

    def restore(self) -> list[str]:
        """Bring back the runs this machine lacks; returns their ids.

        Records that go on from the store's copy stay: they have what a driver wrote in its last seconds. Those
        that differ are from before another machine took over, and give way.
        """
        kept = self._kept()
        brought = []
        for run in sorted({name.partition(".")[0] for name in kept}):
            log = f"{run}.jsonl"
            data = self._get(kept.get(log, []))
            path = inside(self._folder, log)
            mine = path.read_bytes() if path.exists() else None
            others = [name for name in kept if name.partition(".")[0] == run and name != log]
            if mine is None or not mine.startswith(data):
                (self._folder / f"{run}.progress").unlink(missing_ok=True)
                for name in others:
                    _write(inside(self._folder, name), self._get(kept[name]))
                # Last: until then the run counts as lacking.
                _write(path, data)
                brought.append(run)
            # What is no longer here is cleared from the store by the next round.
            self._sent.update(dict.fromkeys(others, (0, 0)) | {log: (len(data), 0)})
        return brought

    def _kept(self) -> dict[str, list[str]]:
        """The pieces in the store, in order, by the name of the file. What no backup wrote is left alone."""
        pieces: dict[str, list[str]] = defaultdict(list)
        for name in self._store.list(self._prefix):
            found = _NAME.fullmatch(name.removeprefix(self._prefix))
            if found is None or not is_name(found["file"]):
                _log.warning("%s is not a tracking record and is skipped", name)
            else:
                pieces[found["file"]].append(name)
        return pieces

    def _get(self, pieces: list[str]) -> bytes:
        data = b""
        for number, piece in enumerate(pieces):
            if len(data) < number * _PIECE:
                # What is behind a piece that is not full is left over from when the file was longer.
                break
            data += self._store.get_bytes(piece)
        return data

    def _send_all(self) -> None:
        paths = [path for path in sorted(self._folder.rglob("*")) if path.is_file() and not _is_draft(path)]
        progress = {path: path.read_bytes() for path in paths if path.suffix == ".progress"}
        for path in paths:
            if path not in progress:
                self._send(path)
        for path, data in progress.items():
            name, now = path.relative_to(self._folder).as_posix(), (len(data), hash(data))
            if self._sent.get(name) != now:
                self._store.put_bytes(self._piece(name, 0), data)
                self._sent[name] = now
        for name in [name for name in self._sent if not (self._folder / name).exists()]:
            self._drop(name, 0)
            del self._sent[name]

    def _send(self, path: Path) -> None:
        name = path.relative_to(self._folder).as_posix()
        try:
            status = path.stat()
            now = (status.st_size, status.st_mtime_ns)
            before = self._sent.get(name, (0, 0))
            if now == before:
                return
            # A line that was cut off by a crash may have begun in the piece before the last.
            first = max(0, min(now[0], before[0]) // _PIECE - 1)
            count = max(1, -(-now[0] // _PIECE))
            with path.open("rb") as file:
                file.seek(first * _PIECE)
                for number in range(first, count):
                    # What is added meanwhile would become a piece of its own behind one that is not full.
                    self._store.put_bytes(
                        self._piece(name, number), file.read(min(_PIECE, now[0] - file.tell()))
                    )
        except FileNotFoundError:  # a copy that was just uploaded to MLflow
            return
        if now[0] < before[0]:
            self._drop(name, count)
        self._sent[name] = now

    def _drop(self, name: str, first: int) -> None:
        for piece in list(self._store.list(f"{self._prefix}{name}/")):
            number = piece.rpartition("/")[2]
            if number.isdecimal() and int(number) >= first:
                self._store.delete(piece)

    def _piece(self, name: str, number: int) -> str:
        return f"{self._prefix}{name}/{number:06d}"

    def _loop(self) -> None:
        while not self._end.wait(self._every_s):
            self.flush()


def _write(path: Path, data: bytes) -> None:
    make_folder(path.parent)
    atomic_write(path, data, only_writer=True)


def _is_draft(path: Path) -> bool:
    # Earlier versions wrote a progress file by way of `<run>.progress.tmp`.
    return path.name.startswith(".") or path.suffix == ".tmp"
