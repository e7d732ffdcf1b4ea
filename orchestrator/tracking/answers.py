"""What MLflow, a database or a driver raises when it is asked, as one error that names the address."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from orchestrator.errors import UserError, first_line
from orchestrator.redact import redacted
from orchestrator.tracking.connect import database_path
from orchestrator.tracking.outage import trouble


class UnreachableError(UserError):
    """MLflow does not answer, or not as it should: the same may work a while later."""


@contextlib.contextmanager
def answering(uri: str, where: str = "tracking.uri") -> Iterator[None]:
    """Makes an UnreachableError that names the address of whatever MLflow, SQLAlchemy or a driver raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        wrong = trouble(uri, error)
        raise UnreachableError(
            f"the registry cannot be reached: {wrong.what}", where=where, hint=wrong.cure
        ) from error


@contextlib.contextmanager
def understood(uri: str) -> Iterator[None]:
    """Makes a UserError of what comes of an answer that no MLflow server gives."""
    try:
        yield
    except (UserError, OSError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(
            f"the registry at {redacted(uri)} gave an answer that cannot be used: {first_line(error)}",
            where="tracking.uri",
            hint="check that an MLflow server is there, and no other program in front of it; then run it again",
        ) from error


def require_database(uri: str) -> None:
    """Raises UserError where a SQLite database is named that is not there: asking would make one."""
    database = database_path(uri)
    if database is not None and not database.exists():
        raise UserError(
            f"there is no MLflow database at {database}",
            where=uri,
            hint="give the pipeline's tracking.uri, such as --tracking sqlite:///FOLDER/runs/mlflow.db",
        )
    if database is not None and not database.is_file():
        raise UserError(
            f"{database} is not a regular file", where=uri, hint="give the pipeline's tracking.uri"
        )
