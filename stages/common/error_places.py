"""Where in a pipeline file a mistake is that an extension, or a data set, has found."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from orchestrator.errors import UserError

# The field that names a data set.
_DATA = "data"


def error_at(error: UserError, at: str, settings: type[BaseModel]) -> UserError:
    """A mistake with the dotted field as its place.

    Args:
        error: its `where` is a dotted field of the settings, or a file or folder of their data set.
        at: the dotted field that has the settings.
        settings: their type.

    Returns:
        What says the file or folder in words, and is at the field that names the data set.
    """
    names = {field.alias or name for name, field in settings.model_fields.items()} | set(
        settings.model_fields
    )
    where = error.where or ""
    if where.partition(".")[0] in names:
        return UserError(error.what, where=f"{at}.{where}", hint=error.hint)
    place = f"{at}.{_DATA}" if _DATA in names else at
    # Whoever named the file already is not told twice.
    is_told = not where or Path(where.partition(":")[0]).name in error.what
    return UserError(error.what if is_told else f"{error.what}, in {where}", where=place, hint=error.hint)
