"""Why MLflow does not take what it is sent: what is wrong, when that ends, and what to do about it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator import disk
from orchestrator.errors import first_line, shortened
from orchestrator.redact import redacted
from orchestrator.tracking.connect import database_path

_LONGEST = 200
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
            f"the tracking database {database} has taken nothing for {seconds:.0f} s",
            "it takes records",
            "see whether its disk answers, and whether another program holds it",
        )
    return Trouble(f"MLflow at {shown} has not answered for {seconds:.0f} s", "it answers", _start(shown))


def trouble(uri: str, error: BaseException) -> Trouble:
    """What an error of MLflow, of a driver or of the system under it says.

    Args:
        uri: of MLflow.
        error: which came of talking to it.
    """
    if isinstance(error, OSError) and error.filename and disk.is_full(error):
        return Trouble(disk.described(error, []), "there is room", "make room on it")
    if isinstance(error, ModuleNotFoundError):
        return Trouble(
            redacted(f"the driver {error.name} of the tracking database at {uri} is not installed"),
            "it is installed",
            f"install the database's driver, {error.name}, or name the one you have: postgresql+psycopg2://…",
        )
    if "mlflow db upgrade" in str(error):
        return Trouble(
            redacted(f"the tracking database at {uri} was made by another version of MLflow"),
            "it has this version's tables",
            redacted(f"copy the database, then: mlflow db upgrade {uri}"),
        )
    return _of_a_server(uri, error) if database_path(uri) is None else _of_a_file(uri, error)


def _of_a_file(uri: str, error: BaseException) -> Trouble:
    path = database_path(uri)
    assert path is not None
    said = " ".join(str(one) for one in _causes(error))
    if disk.is_full_at(error, path.parent):
        return Trouble(disk.described(None, [path.parent]), "there is room", "make room on it")
    if "is locked" in said:
        return Trouble(
            f"the tracking database {path} is locked by another program",
            "it is free",
            f"end what holds it: `fuser {path}` names it",
        )
    if "readonly" in said or "read-only" in said or isinstance(error, PermissionError):
        return Trouble(
            f"the tracking database {path} cannot be written",
            "it can be written",
            f"make it and its folder {path.parent} writable for you",
        )
    if isinstance(error, OSError) or "unable to open" in said:
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        return Trouble(
            f"the tracking database {path} cannot be opened{why}",
            "it can be opened",
            f"see that {path.parent} is a folder that you can write to",
        )
    return Trouble(
        f"the tracking database {path} cannot be used ({_short(_causes_last(error))})",
        "it can be used",
        "put back a copy of the database, or move it away to begin with an empty one",
    )


def _of_a_server(uri: str, error: BaseException) -> Trouble:
    shown = redacted(uri)
    who = f"{'MLflow' if uri.startswith('http') else 'the tracking database'} at {shown}"
    why = _why_silent(error)
    if why is not None:
        return Trouble(f"{who} does not answer ({why})", "it answers", _start(shown))
    code = getattr(error, "error_code", None)
    if code in _DENIED:
        return Trouble(
            f"{who} refuses access ({_short(error)})",
            "it grants access",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        )
    return Trouble(f"{who} answers with an error ({_short(error)})", "it works", "look into its log")


def _why_silent(error: BaseException) -> str | None:
    """Why nothing came back; None if something did."""
    said = [f"{type(one).__name__} {one}" for one in _causes(error)]
    if any(isinstance(one, ConnectionRefusedError) for one in _causes(error)) or _has(said, "refused"):
        return "connection refused"
    if any(isinstance(one, socket.gaierror) for one in _causes(error)) or _has(said, "NameResolution"):
        return "its name is not known"
    if any(isinstance(one, TimeoutError) for one in _causes(error)) or _has(said, "timed out", "Timeout"):
        return "no answer in time"
    if any(isinstance(one, ConnectionError) for one in _causes(error)) or _has(
        said, "ConnectionError", "Connection aborted", "RemoteDisconnected", "too many 50", "error code 50"
    ):
        return _short(_causes_last(error))
    return None


def _has(said: list[str], *texts: str) -> bool:
    return any(text in one for one in said for text in texts)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _causes_last(error: BaseException) -> BaseException:
    return list(_causes(error))[-1]


def _short(error: BaseException) -> str:
    text = first_line(error) if isinstance(error, Exception) else type(error).__name__
    return redacted(shortened(text, _LONGEST))


def _start(shown: str) -> str:
    return f"start the server at {shown}, or set `tracking.uri` to one that answers"
