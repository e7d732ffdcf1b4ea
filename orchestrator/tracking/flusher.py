"""The background thread that brings spooled records to MLflow, for as long as that takes."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from orchestrator.fsio import atomic_write
from orchestrator.names import BadNameError, inside
from orchestrator.tracking.backlog import Outage, SendProgress, clock, note_outage, pending, progress
from orchestrator.tracking.mlflow_writer import (
    MAX_METRICS,
    MlflowWriter,
    RejectedError,
    RunGoneError,
    UnknownRecordError,
    UnusableRecordError,
)
from orchestrator.tracking.outage import silent, trouble
from orchestrator.tracking.spool import Record, Spool, is_run_id

_log = logging.getLogger(__name__)
_MAX_WAIT_S = 30.0
# While somebody waits for the rest to go out: a server that comes back is to be noticed within their patience.
_HURRIED_S = 1.0
# MLflow's import takes seconds, on a busy machine many; and so does making a database.
_LOCAL_WORK_S = 120.0
# One request may carry a file of any size. What is slower than this counts as standing still.
_SLOWEST = 2**20
# Records that carry files. These may go elsewhere than the rest, such as into a bucket that is not there.
_UPLOADS = ("file", "model")


@dataclass
class Counts:
    """What became of the records that a flusher has sent.

    Attributes:
        sent: MLflow has them.
        refused: MLflow will never take them.
        unknown: they are of kinds that this version does not know.
        unusable: they are damaged, or their files are not in the store.
    """

    sent: int = 0
    refused: int = 0
    unknown: int = 0
    unusable: int = 0


@dataclass
class _Aside:
    """A run whose upload fails: how often it has, the last time at `at` by the monotonic clock."""

    at: float
    failures: int = 1

    def waits(self, hurried: bool) -> bool:
        """Whether it is too early to try again."""
        pause = _pause(self.failures - 1)
        return time.monotonic() < self.at + (min(pause, _HURRIED_S) if hurried else pause)


class Flusher:
    """Sends what is in the spool, also what earlier processes left there. One flusher a spool at a time.

    Nothing it meets reaches the caller: an outage is warned about once, and tried again with growing pauses.

    Args:
        interval_s: pause between looks at the spool.
        metrics_every_s: pause between metrics of one run: MLflow takes 9 ms for those of one step, and 3 ms each for
            those of five. Other records are sent at once, and what is there before them.

    Attributes:
        counts: of the records so far.
    """

    def __init__(
        self, spool: Spool, sink: MlflowWriter, *, interval_s: float = 1.0, metrics_every_s: float = 5.0
    ) -> None:
        self.counts = Counts()
        self._spool = spool
        self._sink = sink
        self._interval_s = interval_s
        self._metrics_every_s = metrics_every_s
        self._metrics_sent: dict[str, float] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._hurried = False
        self._thread: threading.Thread | None = None
        self._failures = 0
        self._outage: Outage | None = None
        # Whose records a warning of this outage has named: a run's, or, as None, those of all.
        self._reported: set[str | None] = set()
        self._prepared = False
        # A process before this one may have left a note.
        self._noted = True
        self._refused: set[tuple[str, str]] = set()
        self._aside: dict[str, _Aside] = {}
        self._uploading = False
        # When the newest answer came, and how long what was begun then may take beyond anybody's patience.
        self._heard = time.monotonic()
        self._extra_s = _LOCAL_WORK_S

    def start(self) -> None:
        """Starts the thread, which first imports MLflow and connects. Starting twice is fine."""
        if self._thread is None:
            # A daemon: a server that hangs must not keep the process alive; the spool keeps the records.
            self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)
            self._thread.start()

    def pending(self) -> int:
        """Bytes in the spool that MLflow does not have yet."""
        return pending(self._spool)

    def drain(self, patience: float, watch: Callable[[], bool] = lambda: True) -> bool:
        """Waits until everything is sent; True if it is.

        Args:
            patience: seconds without an answer after which it gives up. They count from the newest answer, not from
                the start: a server that takes a long time is waited for as long as it takes records. What this
                process does itself, such as importing MLflow, does not count, nor does a request that carries a
                large file, at a MiB a second. 0 waits for nothing.
            watch: called all the while; False ends the waiting.
        """
        begun, failures = time.monotonic(), self._failures
        # Who has been away for longer than that is asked once more, and not waited for again.
        known = self._outage is not None and time.time() - self._outage.since > patience
        self.start()
        self._hurried = True
        self._wake.set()
        try:
            while self.pending():
                # The first of two failures may be of what was begun before.
                asked = known and self._failures > failures + 1
                if asked or time.monotonic() >= self._deadline(begun, patience):
                    self._note_silence(patience)
                    return False
                if not watch():
                    return False
                time.sleep(0.02)
        finally:
            self._hurried = False
        return True

    def stop(self, timeout: float = 1.0) -> None:
        """Ends the thread after the request it is in, waiting at most `timeout` seconds for that."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _deadline(self, begun: float, patience: float) -> float:
        return max(begun, self._heard) + patience + self._extra_s if patience > 0 else begun

    def _note_silence(self, patience: float) -> None:
        """A server that says nothing at all causes no error for a long time."""
        if patience > 0 and self._outage is None:
            self._outage = Outage(silent(self._sink.uri, patience), time.time() - patience)
            self._reported = {None}
            note_outage(self._spool, self._outage)
            self._noted = True

    def _answered(self, extra_s: float = 0.0) -> None:
        """Something was done just now; what comes next may take so many seconds more than a small request."""
        self._heard, self._extra_s = time.monotonic(), extra_s

    def _loop(self) -> None:
        while not self._stopping:
            try:
                self._prepare()
                while self._flush_all() and not self._stopping:
                    pass
                if not self._aside:
                    self._recovered()
                pause = self._interval_s
            except Exception as error:  # whatever a server or a driver can throw: training goes on
                self._failed(error)
                pause = _pause(self._failures) * random.uniform(0.5, 1.0)
            self._wake.wait(min(pause, _HURRIED_S) if self._hurried else pause)
            self._wake.clear()

    def _prepare(self) -> None:
        if not self._prepared:
            self._sink.prepare()
            self._prepared = True
            self._answered(_LOCAL_WORK_S if self._sink.makes_database else 0.0)

    def _failed(self, error: Exception, run_id: str | None = None) -> None:
        """Of one run only, if it is named: those of others go on."""
        self._failures += 1
        self._extra_s = 0.0
        found = trouble(self._sink.uri, error, self._spool.folder)
        known = self._outage
        since = time.time() if known is None else known.since
        self._outage = Outage(found, since)
        note_outage(self._spool, self._outage)
        self._noted = True
        # What an error says may be another thing each time.
        if known is None or known.trouble.until != found.until:
            self._reported.clear()
        if not self._reported & {None, run_id}:
            self._reported.add(run_id)
            _log.warning(
                "%s since %s: %s are kept in %s and sent as soon as %s",
                found.what,
                clock(since),
                "tracking records" if run_id is None else f"the tracking records of run {run_id}",
                self._spool.folder,
                found.until,
            )
        self._sink.reconnect()

    def _recovered(self) -> None:
        if self._outage is not None:
            _log.warning(
                "tracking works again after %.0f s: the records that were kept are sent",
                time.time() - self._outage.since,
            )
            self._outage = None
            self._failures = 0
        if self._noted:
            note_outage(self._spool, None)
            self._noted = False

    def _flush_all(self) -> bool:
        """One round over all runs; True if anything was sent. A run waits until its parent is there."""
        sent = False
        for run_id in self._spool.run_ids():
            aside = self._aside.get(run_id)
            if aside is not None and aside.waits(self._hurried):
                continue
            self._uploading = False
            try:
                sent = self._flush(run_id) or sent
            except Exception as error:
                if not self._uploading:
                    raise
                # Files may go elsewhere than records do: that place is away, and MLflow takes what others have.
                self._failed(error, run_id)
                failures = 0 if aside is None else aside.failures
                self._aside[run_id] = _Aside(time.monotonic(), failures + 1)
            else:
                self._aside.pop(run_id, None)
        return sent

    def _flush(self, run_id: str) -> bool:
        state = progress(self._spool, run_id)
        if self._spool.size(run_id) <= state.offset:
            return False
        # A record must be safe before it is sent: a power cut could leave an offset beyond the file's end.
        self._spool.sync(run_id)
        records, end = self._spool.read_all(run_id, state.offset)
        if records and not self._are_due(run_id, records):
            return False
        sent = False
        while records and not self._stopping:
            count = _batch(records)
            try:
                self._begin(records[0][0], run_id)
                # Counted once all are sent: what fails in the middle is sent again as a whole.
                left_out = Counts()
                done = self._send(run_id, [record for record, _ in records[:count]], state, left_out)
                self._uploading = False
            except RunGoneError as error:
                if state.mlflow_run_id is None:
                    raise
                _log.warning("run %s is gone from MLflow and will be logged again: %s", run_id, error)
                self._note(run_id, SendProgress())
                return True
            if not done:
                return sent
            self.counts.refused += left_out.refused
            self.counts.unknown += left_out.unknown
            self.counts.unusable += left_out.unusable
            self.counts.sent += count - left_out.refused - left_out.unknown - left_out.unusable
            state.offset = records[count - 1][1]
            self._note(run_id, state)
            self._answered()
            for record, _ in records[:count]:
                if record["op"] == "file":
                    self._drop_copy(run_id, record["copy"])
            records = records[count:]
            sent = True
        if not records and state.offset < end:
            # Damaged lines at the end: there is nothing in them to send.
            state.offset = end
            self._note(run_id, state)
        if not records and self._spool.size(run_id) > end:
            # A line without an end. Nobody may ever add to this file, and what is not sent is waited for.
            self._spool.cut_torn_line(run_id)
        return sent

    def _are_due(self, run_id: str, records: Sequence[tuple[Record, int]]) -> bool:
        now = time.monotonic()
        # In an outage an attempt shows whether it is over.
        waits = (
            self._outage is None and not self._hurried and all(one["op"] == "metrics" for one, _ in records)
        )
        if waits and now - self._metrics_sent.get(run_id, -math.inf) < self._metrics_every_s:
            return False
        self._metrics_sent[run_id] = now
        return True

    def _send(self, run_id: str, batch: list[Record], state: SendProgress, left_out: Counts) -> bool:
        """Sends records of one kind. False if the run cannot be opened before its parent is.

        Args:
            left_out: gets those added that are not sent.
        """
        first = batch[0]
        try:
            if first["op"] == "open":
                parent = first.get("parent")
                if not is_run_id(parent):  # none, or a damaged one, which costs the nesting only
                    parent = None
                parent_id = progress(self._spool, parent).mlflow_run_id if parent else None
                if parent and parent_id is None:
                    if self._will_be_opened(parent):
                        return False
                    _log.warning(
                        "run %s is logged to MLflow without its parent: %s has no record to open it by",
                        run_id,
                        self._spool.path(parent),
                    )
                state.mlflow_run_id = self._sink.open(run_id, first, state.mlflow_run_id, parent_id)
                return True
            if state.mlflow_run_id is None:
                state.mlflow_run_id = self._reopened(run_id, first)
                self._note(run_id, state)
            if first["op"] == "metrics":
                self._sink.metrics(state.mlflow_run_id, batch)
            else:
                self._sink.apply(state.mlflow_run_id, first, self._spool.files(run_id))
        except RejectedError as error:
            if len(batch) > 1:  # find the one record that MLflow refuses
                for record in batch:
                    self._send(run_id, [record], state, left_out)
                return True
            is_unknown = isinstance(error, UnknownRecordError)
            left_out.unknown += is_unknown
            is_unusable = isinstance(error, UnusableRecordError)
            left_out.unusable += is_unusable
            left_out.refused += not (is_unknown or is_unusable)
            if (run_id, first["op"]) not in self._refused:
                self._refused.add((run_id, first["op"]))
                what = (
                    "a record is skipped"
                    if is_unknown
                    else f"a record of kind {first['op']!r:.40} is left out"
                    if is_unusable
                    else f"MLflow refuses a record of kind {first['op']!r:.40}"
                )
                _log.warning("run %s: %s: %s", run_id, what, error)
        return True

    def _will_be_opened(self, run_id: str) -> bool:
        """Whether there is a record that opens the run when its turn comes."""
        return bool(self._spool.read_all(run_id, progress(self._spool, run_id).offset)[0])

    def _reopened(self, run_id: str, first: Record) -> str:
        """The MLflow id of a run whose own record is missing or refused: name, tags and parent are lost, no more."""
        found = self._sink.open(run_id, {"name": run_id, "time_ms": first["time_ms"]}, None, None)
        _log.warning(
            "run %s is logged to MLflow without its name, tags and parent: the record that has them is damaged or was "
            "refused",
            run_id,
        )
        return found

    def _begin(self, record: Record, run_id: str) -> None:
        """A request is about to be sent."""
        self._uploading = record["op"] in _UPLOADS
        size = self._sink.upload_size(record, self._spool.files(run_id))
        self._extra_s = max(self._extra_s, size / _SLOWEST)

    def _drop_copy(self, run_id: str, copy: str) -> None:
        with contextlib.suppress(BadNameError):  # the record was refused for it
            shutil.rmtree(inside(self._spool.files(run_id), copy), ignore_errors=True)

    def _note(self, run_id: str, state: SendProgress) -> None:
        path = self._spool.path(run_id).with_suffix(".progress")
        try:
            # After every batch, and what a power cut spoils costs no more than to send records twice.
            atomic_write(path, json.dumps(asdict(state)), durable=False, only_writer=True)
        except OSError as error:
            # The name tells this folder from that of a database.
            raise OSError(error.errno, error.strerror, str(path)) from error


def _pause(failures: int) -> float:
    """Seconds between the last of so many failures in a row and the next try."""
    # After 1,024 failures, a night without the server, the power is too large for a float.
    return min(_MAX_WAIT_S, 0.5 * 2.0 ** min(failures, 6))


def _batch(records: list[tuple[Record, int]]) -> int:
    """How many of the first records go into one request."""
    count = values = 0
    for record, _ in records:
        values += len(record.get("metrics", {}))
        if record["op"] != "metrics" or values > MAX_METRICS:
            break
        count += 1
    return max(1, count)
