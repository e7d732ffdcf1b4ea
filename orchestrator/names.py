"""Names that come out of a store, a record or a registry, turned into paths that cannot lead anywhere else.

Whoever can write to a store can put any name into it: into a manifest, a listing, a tracking record. Every such name
goes through this module before it is joined to a folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from orchestrator.errors import UserError

# What S3 takes for a whole name and what file systems take for one part of it, in bytes of UTF-8.
_LONGEST, _LONGEST_PART = 1024, 255
_SHOWN = 80
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DRIVE = re.compile(r"[A-Za-z]:")


class BadNameError(UserError, ValueError):
    """A stored name that may not be used: it leads out of its folder, or no file can have it."""

    def __init__(self, name: str, why: str) -> None:
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…"
        super().__init__(f"not an object name: {shown!r} {why}")


def parts_of(name: str) -> tuple[str, ...]:
    """The parts of a stored name: a relative POSIX path, in the only spelling it has.

    Raises:
        BadNameError: it is empty, absolute, too long, or has a way up, an empty part, a drive, a backslash, a control
            character or what is not Unicode.
    """
    why = _wrong(name)
    if why is not None:
        raise BadNameError(name, why)
    return tuple(name.split("/"))


def is_name(name: str) -> bool:
    """Whether :func:`parts_of` takes the name."""
    return _wrong(name) is None


def inside(folder: Path, name: str) -> Path:
    """The path of the stored name `name` below `folder`, for reading or writing.

    Raises:
        BadNameError: as for :func:`parts_of`, or a link on the way leads out of the folder.
    """
    path = folder.joinpath(*parts_of(name))
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BadNameError(name, "leads out of its folder by a link")
    return path


def _wrong(name: str) -> str | None:
    if not name:
        return "is empty"
    if _CONTROL.search(name):
        return "has a control character"
    if "\\" in name:
        return "has a backslash"
    if _DRIVE.match(name):
        return "begins with a drive"
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "is not Unicode"
    if length > _LONGEST:
        return f"is longer than {_LONGEST} bytes"
    return next((why for part in name.split("/") if (why := _wrong_part(part)) is not None), None)


def _wrong_part(part: str) -> str | None:
    if part == "":
        return "is absolute, or has an empty part"
    if part in (".", ".."):
        return f"has the part {part!r}"
    return f"has a part longer than {_LONGEST_PART} bytes" if len(part.encode()) > _LONGEST_PART else None
