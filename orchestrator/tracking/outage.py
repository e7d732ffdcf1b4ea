"""Why MLflow does not take what it is sent: what is wrong, when that ends, and what to do about it."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from http.client import BadStatusLine, LineTooLong
from pathlib import Path

from orchestrator import disk
from orchestrator.errors import causes, first_line, shortened
from orchestrator.redact import redacted
from orchestrator.tracking.connect import database_path

_LONGEST = 200
_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)
# Of bytes that are not HTTP. `RemoteDisconnected` is one of them too, and a ConnectionError besides.
_NO_HTTP = (BadStatusLine, LineTooLong)
_DENIED = ("UNAUTHENTICATED", "PERMISSION_DENIED")


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a tracking server or database.

    Attributes:
        what: a sentence without its end, such as `MLflow at http://… does not answer (connection refused)`.
        until: what would end it, such as `it answers`.
        cure: what a user can do, as an imperative.
    """

    what: str
    until: str
    cure: str


def silent(uri: str, seconds: float) -> Trouble:
    """Nothing came back for so long, not even an error."""
    shown = redacted(uri)
    database = database_path(uri)
    if database is not None:
        return Trouble(
            f"the tracking database {database} has accepted nothing for {seconds:.0f} s",
            "it accepts records",
            "check whether its disk responds, and whether another program has locked it",
        )
    return Trouble(f"MLflow at {shown} has not answered for {seconds:.0f} s", "it answers", _start(shown))


def trouble(uri: str, error: BaseException, spool: Path | None = None) -> Trouble:
    """What an error of MLflow, of a driver or of the system under it says.

    Args:
        uri: of MLflow.
        error: which came of talking to it.
        spool: where records wait. Trouble with a file in it is not MLflow's.
    """
    file = disk.file_of(error)
    if file is not None and disk.is_full(error):
        return Trouble(disk.described(error), "there is space", "free some space on it")
    if file is not None and spool is not None and file.is_relative_to(spool):
        return Trouble(
            f"the folder of tracking records {spool} cannot be used ({_reason(error)})",
            "it can be used",
            f"make {spool} and everything in it readable and writable for you",
        )
    if isinstance(error, ModuleNotFoundError):
        scheme = uri.partition(":")[0].partition("+")[0]
        return Trouble(
            redacted(
                f"the tracking database at {uri} cannot be used: its driver {error.name} is not installed"
            ),
            "it is installed",
            f"install {error.name}, or name the driver that is installed, as in {scheme}+DRIVER://…",
        )
    if "mlflow db upgrade" in str(error):
        return Trouble(
            redacted(f"the tracking database at {uri} was made by another version of MLflow"),
            "it has this version's tables",
            redacted(f"back up the database, then run: mlflow db upgrade {uri}"),
        )
    return _of_a_server(uri, error) if database_path(uri) is None else _of_a_file(uri, error)


def _of_a_file(uri: str, error: BaseException) -> Trouble:
    path = database_path(uri)
    assert path is not None
    messages = " ".join(str(one) for one in causes(error))
    if disk.is_full_at(error, path.parent):
        why = disk.described(error, [path.parent])
        return Trouble(
            f"the tracking database {path} cannot be written: {why}",
            "there is space",
            "free some space on it",
        )
    if isinstance(error, IsADirectoryError):
        return Trouble(
            f"the tracking database {path} is a folder",
            "it is a file",
            "name a file in it, such as mlflow.db",
        )
    if "file is not a database" in messages:
        return Trouble(
            f"the tracking database {path} is not an SQLite database",
            "it is one",
            "restore a copy of the database, or name another file",
        )
    if "is locked" in messages:
        return Trouble(
            f"the tracking database {path} is locked by another program",
            "it is free",
            f"stop the program that locks it: `fuser {path}` shows which one",
        )
    if "readonly" in messages or "read-only" in messages or isinstance(error, PermissionError):
        return Trouble(
            f"the tracking database {path} cannot be written",
            "it can be written",
            f"make it and its folder {path.parent} writable for you",
        )
    if isinstance(error, OSError) or "unable to open" in messages:
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        return Trouble(
            f"the tracking database {path} cannot be opened{why}",
            "it can be opened",
            f"make sure that {path.parent} is a folder that you can write to",
        )
    return Trouble(
        f"the tracking database {path} cannot be used ({_short(_causes_last(error))})",
        "it can be used",
        "restore a copy of the database, or move it away to start with an empty one",
    )


def _of_a_server(uri: str, error: BaseException) -> Trouble:
    shown = redacted(uri)
    who = f"{'MLflow' if uri.startswith('http') else 'the tracking database'} at {shown}"
    if any(isinstance(one, _NO_HTTP) and not isinstance(one, ConnectionError) for one in causes(error)):
        return Trouble(
            f"the server at {shown} is not an HTTP server",
            "MLflow answers there",
            "set `tracking.uri` to MLflow's address",
        )
    why = _no_answer_reason(error)
    if why is not None:
        return Trouble(f"{who} does not answer ({why})", "it answers", _start(shown))
    code = getattr(error, "error_code", None)
    if code in _DENIED:
        return Trouble(
            f"{who} refuses access ({_short(error)})",
            "it grants access",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        )
    return Trouble(f"{who} answers with an error ({_short(error)})", "it works", "check its log")


def _no_answer_reason(error: BaseException) -> str | None:
    """Why nothing came back; None if something did."""
    messages = [f"{type(one).__name__} {one}" for one in causes(error)]
    if any(isinstance(one, ConnectionRefusedError) for one in causes(error)) or _has(messages, "refused"):
        return "connection refused"
    if any(isinstance(one, socket.gaierror) for one in causes(error)) or _has(messages, "NameResolution"):
        return "its name is not known"
    if any(isinstance(one, TimeoutError) for one in causes(error)) or _has(messages, "timed out", "Timeout"):
        return "no answer in time"
    if any(isinstance(one, ConnectionError) or _is_unreachable(one) for one in causes(error)) or _has(
        messages,
        "ConnectionError",
        "Connection aborted",
        "RemoteDisconnected",
        "too many 50",
        "error code 50",
    ):
        return _reason(_causes_last(error))
    return None


def _is_unreachable(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _UNREACHABLE


def _has(messages: list[str], *texts: str) -> bool:
    return any(text in one for one in messages for text in texts)


def _causes_last(error: BaseException) -> BaseException:
    return list(causes(error))[-1]


def _short(error: BaseException) -> str:
    text = first_line(error) if isinstance(error, Exception) else type(error).__name__
    return redacted(shortened(text, _LONGEST))


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or _short(error)


def _start(shown: str) -> str:
    return f"start the server at {shown}, or set `tracking.uri` to one that answers"
