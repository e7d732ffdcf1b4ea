"""The background thread that brings spooled records to MLflow, for as long as that takes."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
import threading
import time
from dataclasses import asdict, dataclass

from orchestrator.names import BadNameError, inside
from orchestrator.tracking.sink import MAX_METRICS, MlflowSink, RejectedError, RunGoneError
from orchestrator.tracking.spool import Record, Spool, is_run_id

_log = logging.getLogger(__name__)
_MAX_WAIT_S = 30.0


@dataclass
class Progress:
    """What MLflow has of a run: its id there, and the bytes of the spool file that were sent."""

    mlflow_run_id: str | None = None
    offset: int = 0


def progress(spool: Spool, run_id: str) -> Progress:
    """The noted progress of a run; none if there is no note or it is torn (sending twice does no harm)."""
    try:
        noted = json.loads(spool.path(run_id).with_suffix(".progress").read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return Progress()
    known, offset = (
        (noted.get("mlflow_run_id"), noted.get("offset")) if isinstance(noted, dict) else (None, None)
    )
    if not isinstance(known, str | None) or not isinstance(offset, int) or offset < 0:
        return Progress()
    return Progress(known, offset)


class Flusher:
    """Sends what is in the spool, also what earlier processes left there. One flusher a spool at a time.

    Nothing it meets reaches the caller: an outage is warned about once, and tried again with growing pauses.

    Args:
        interval_s: pause between looks at the spool.
    """

    def __init__(self, spool: Spool, sink: MlflowSink, *, interval_s: float = 1.0) -> None:
        self._spool = spool
        self._sink = sink
        self._interval_s = interval_s
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._failures = 0

    def start(self) -> None:
        """Starts the thread, which first imports MLflow and connects. Starting twice is fine."""
        if self._thread is None:
            # A daemon: a server that hangs must not keep the process alive; the spool keeps the records.
            self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)
            self._thread.start()

    def pending(self) -> int:
        """Bytes in the spool that MLflow does not have yet."""
        spool = self._spool
        return sum(max(0, spool.size(run) - progress(spool, run).offset) for run in spool.run_ids())

    def drain(self, timeout: float) -> bool:
        """Waits at most `timeout` seconds until everything is sent; True if it is."""
        deadline = time.monotonic() + timeout
        self.start()
        self._wake.set()
        while self.pending():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    def stop(self, timeout: float = 1.0) -> None:
        """Ends the thread after the request it is in, waiting at most `timeout` seconds for that."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _loop(self) -> None:
        while not self._stopping:
            try:
                while self._flush_all() and not self._stopping:
                    pass
                if self._failures:
                    _log.warning("tracking works again")
                self._failures = 0
                pause = self._interval_s
            except Exception as error:  # whatever a server or a driver can throw: training goes on
                self._failures += 1
                if self._failures == 1:
                    _log.warning("tracking is down, records wait in %s: %s", self._spool.folder, error)
                self._sink.reconnect()
                pause = min(_MAX_WAIT_S, 0.5 * 2**self._failures) * random.uniform(0.5, 1.0)
            self._wake.wait(pause)
            self._wake.clear()

    def _flush_all(self) -> bool:
        """One round over all runs; True if anything was sent. A run waits until its parent is there."""
        sent = False
        for run_id in self._spool.run_ids():
            sent = self._flush(run_id) or sent
        return sent

    def _flush(self, run_id: str) -> bool:
        state = progress(self._spool, run_id)
        if self._spool.size(run_id) <= state.offset:
            return False
        # A record must be safe before it is sent: a power cut could leave an offset beyond the file's end.
        self._spool.sync(run_id)
        records, end = self._spool.read_all(run_id, state.offset)
        sent = False
        while records and not self._stopping:
            count = _batch(records)
            try:
                done = self._send(run_id, [record for record, _ in records[:count]], state)
            except RunGoneError as error:
                if state.mlflow_run_id is None:
                    raise
                _log.warning("run %s is gone from MLflow and will be logged anew: %s", run_id, error)
                self._note(run_id, Progress())
                return True
            if not done:
                return sent
            state.offset = records[count - 1][1]
            self._note(run_id, state)
            for record, _ in records[:count]:
                if record["op"] == "file":
                    self._drop_copy(run_id, record["copy"])
            records = records[count:]
            sent = True
        if not records and state.offset < end:
            # Damaged lines at the end: there is nothing in them to send.
            state.offset = end
            self._note(run_id, state)
        return sent

    def _send(self, run_id: str, batch: list[Record], state: Progress) -> bool:
        """Sends records of one kind. False if the run cannot be opened before its parent is."""
        first = batch[0]
        try:
            if first["op"] == "open":
                parent = first.get("parent")
                if parent is not None and not is_run_id(parent):
                    raise RejectedError(f"not a run id: {parent!r:.80}")
                parent_id = progress(self._spool, parent).mlflow_run_id if parent else None
                if parent and parent_id is None and self._spool.size(parent):
                    return False
                state.mlflow_run_id = self._sink.open(run_id, first, state.mlflow_run_id, parent_id)
            elif state.mlflow_run_id is None:
                raise RejectedError("the run was never opened")
            elif first["op"] == "metrics":
                self._sink.metrics(state.mlflow_run_id, batch)
            else:
                self._sink.apply(state.mlflow_run_id, first, self._spool.files(run_id))
        except RejectedError as error:
            if len(batch) > 1:  # find the one record that MLflow refuses
                for record in batch:
                    self._send(run_id, [record], state)
                return True
            _log.warning("MLflow refuses a %s record of run %s: %s", first["op"], run_id, error)
        return True

    def _drop_copy(self, run_id: str, copy: str) -> None:
        with contextlib.suppress(BadNameError):  # the record was refused for it
            shutil.rmtree(inside(self._spool.files(run_id), copy), ignore_errors=True)

    def _note(self, run_id: str, state: Progress) -> None:
        path = self._spool.path(run_id).with_suffix(".progress")
        temporary = path.with_suffix(".progress.tmp")
        temporary.write_text(json.dumps(asdict(state)))
        temporary.replace(path)


def _batch(records: list[tuple[Record, int]]) -> int:
    """How many of the first records go into one request."""
    count = values = 0
    for record, _ in records:
        values += len(record.get("metrics", {}))
        if record["op"] != "metrics" or values > MAX_METRICS:
            break
        count += 1
    return max(1, count)
