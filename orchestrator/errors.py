"""The one error a user's mistake raises: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence

from orchestrator.redact import redacted

# Of two names, by difflib's ratio: `pretrian` is pretrain, `init` is not kind.
_LIKENESS = 0.6
_LONGEST_NAME = 200
# Characters of one line of a message.
_LINE = 1000
# Mistakes that are shown at once.
_MAX_ERRORS = 20


class UserError(Exception):
    """A mistake the user can mend. The CLI prints it without a traceback and exits with code 2.

    Args:
        what: what is wrong, with the offending value.
        where: file, line and key path, or the path on disk.
        hint: the nearest right thing, as an imperative.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        # Each on its own: one that begins with an address may be the address alone.
        lines = [redacted(self.what)]
        if self.where:
            lines.append(f"  at   {redacted(self.where)}")
        if self.hint:
            lines.append(f"  hint {redacted(self.hint)}")
        return "\n".join(shortened(line) for line in "\n".join(lines).split("\n"))

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries; the default would lose the keyword arguments.
        return _rebuild, (self.what, self.where, self.hint)


def _rebuild(what: str, where: str | None, hint: str | None) -> UserError:
    return UserError(what, where=where, hint=hint)


def joined(errors: Sequence[UserError]) -> UserError:
    """Several mistakes as one, which names each."""
    if len(errors) == 1:
        return errors[0]
    shown = [str(error) for error in errors[:_MAX_ERRORS]]
    if len(errors) > _MAX_ERRORS:
        shown.append(f"and {len(errors) - _MAX_ERRORS} more mistakes")
    return UserError("\n".join(shown))


class KeyMistakeError(ValueError):
    """A key of a section does not fit another one. Checks of a section raise it, for the error to name the key.

    Args:
        what: what is wrong, with the values.
        key: the key to change: a dotted path from the section that was checked.
        hint: the nearest right thing, as an imperative.
    """

    def __init__(self, what: str, *, key: str, hint: str) -> None:
        super().__init__(f"{what}; {hint}")
        self.what = what
        self.key = key
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_key_mistake, (self.what, self.key, self.hint)


def _rebuild_key_mistake(what: str, key: str, hint: str) -> KeyMistakeError:
    return KeyMistakeError(what, key=key, hint=hint)


class Stopped(Exception):  # noqa: N818 - no error: the user asked for it
    """The user asked the pipeline to stop; everything is checkpointed and can go on later."""


class ClusterLostError(Exception):
    """The Ray cluster under a running stage has gone; what the stage had checkpointed is there.

    Args:
        what: which part ended, and how.
        own: whether it was the pipeline's own cluster, so that a new one can be started.
    """

    def __init__(self, what: str, *, own: bool) -> None:
        super().__init__(what)
        self.own = own


def shortened(text: str, limit: int = _LINE) -> str:
    """Text for a terminal: control characters escaped, what is beyond the limit cut out of its middle."""
    # Cut twice: escaping makes texts longer, and there may be much of it.
    text = _cut(text, limit)
    return _cut(
        "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text), limit
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what brought it about, what brought that about, and so on; without what was hidden by `from None`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


class TerminatedError(BaseException):
    """SIGTERM came. Like KeyboardInterrupt it is not an Exception, so that nobody takes it for a failure."""


def printable(error: Exception) -> Exception:
    """The error itself; another one in its place if its text cannot be made, as of a class of a user's package."""
    try:
        str(error)
    except Exception:
        return RuntimeError(f"{type(error).__name__}, whose text cannot be shown")
    return error


def first_line(error: Exception) -> str:
    """An error on one line; of a ValidationError its first error, with its place and without the value."""
    # The command line is there before pydantic is.
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place}: {first['msg']}" if place else first["msg"]
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]} … {text[-limit // 4 :]}"


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` was probably meant to be, or None."""
    if len(name) > _LONGEST_NAME:
        return None
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=_LIKENESS)
    return matches[0] if matches else None
