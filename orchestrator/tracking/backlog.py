"""What a spool has that MLflow has not, since when, and why: what `status`, `sync` and the end of a run say."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass

from orchestrator.fsio import NotAFileError, atomic_write, open_regular
from orchestrator.tracking.outage import Trouble
from orchestrator.tracking.spool import LATEST_S, Spool

# A hidden file: the copy of the spool in the store leaves those out.
_OUTAGE = ".outage.json"


@dataclass
class SendProgress:
    """What MLflow has of a run: its id there, and the bytes of the spool file that were sent."""

    mlflow_run_id: str | None = None
    offset: int = 0


@dataclass(frozen=True)
class Backlog:
    """Records that wait to be sent.

    Attributes:
        records: how many.
        runs: of how many runs.
        since: when the oldest was made, in seconds since 1970.
    """

    records: int
    runs: int
    since: float


@dataclass(frozen=True)
class Outage:
    """Why nothing goes to MLflow, and since when, in seconds since 1970."""

    trouble: Trouble
    since: float


def progress(spool: Spool, run_id: str) -> SendProgress:
    """The noted progress of a run; none if there is no note or it is torn (sending twice does no harm)."""
    try:
        with open_regular(spool.path(run_id).with_suffix(".progress")) as file:
            noted = json.loads(file.read())
    except (FileNotFoundError, NotAFileError, IsADirectoryError, ValueError, RecursionError):
        return SendProgress()
    known, offset = (
        (noted.get("mlflow_run_id"), noted.get("offset")) if isinstance(noted, dict) else (None, None)
    )
    if not isinstance(known, str | None) or known == "" or not isinstance(offset, int) or offset < 0:
        return SendProgress()
    if offset > spool.size(run_id):  # a note of more than there is belongs to another file
        return SendProgress()
    return SendProgress(known, offset)


def pending(spool: Spool) -> int:
    """Bytes in the spool that MLflow does not have yet."""
    return sum(max(0, spool.size(run) - progress(spool, run).offset) for run in spool.run_ids())


def sent(spool: Spool) -> int:
    """Bytes of the spool that MLflow has."""
    return sum(progress(spool, run).offset for run in spool.run_ids())


def backlog(spool: Spool) -> Backlog | None:
    """What waits; None if nothing does."""
    records = runs = 0
    oldest: int | None = None
    for run in spool.run_ids():
        start = progress(spool, run).offset
        waiting = spool.read(run, start) if spool.size(run) > start else []
        if waiting:
            records, runs = records + len(waiting), runs + 1
            first = int(waiting[0][0]["time_ms"])
            oldest = first if oldest is None else min(oldest, first)
    return None if oldest is None else Backlog(records, runs, oldest / 1000)


def note_outage(spool: Spool, outage: Outage | None) -> None:
    """Keep for other processes why nothing is taken; None: all is well. No more than a note: it may get lost."""
    path = spool.folder / _OUTAGE
    with contextlib.suppress(OSError):
        if outage is None:
            path.unlink(missing_ok=True)
        else:
            noted = json.dumps({"since": outage.since, **asdict(outage.trouble)})
            # It is of use to processes of now only.
            atomic_write(path, noted, durable=False, only_writer=True)


def noted_outage(spool: Spool) -> Outage | None:
    """Why nothing is taken, as far as a process has noted it."""
    try:
        with open_regular(spool.folder / _OUTAGE) as file:
            noted = json.loads(file.read())
        since = float(noted["since"])
        if not 0 <= since <= LATEST_S:
            return None
        return Outage(Trouble(*(str(noted[name]) for name in ("what", "until", "cure"))), since)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def clock(at: float) -> str:
    """A time of day, with its date where that is another day's: `14:02:11`, `2026-11-20 14:02`."""
    then, now = time.localtime(at), time.localtime()
    return time.strftime("%H:%M:%S" if then[:3] == now[:3] else "%Y-%m-%d %H:%M", then)


def counted(records: int) -> str:
    """`1 tracking record`, `1,204 tracking records`."""
    return f"{records:,} tracking record{'' if records == 1 else 's'}"
