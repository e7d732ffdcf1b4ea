"""What may be a secret in a text: found, so that it is refused, and taken out of whatever leaves the process.

Known are user information in addresses (`scheme://user:password@host`), values of parameters in addresses that are
called token, signature, password and the like, the
password of a database's connection string, access keys and tokens in the forms of AWS, GitHub, GitLab, Hugging Face
and Slack, and the values of environment variables with such names. A password that stands alone under another name is
not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache
from typing import Any
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"

# Texts of any kind and length come by here, so the time grows in proportion to the text. What repeats either ends where
# the next address begins, or is bounded, or is measured once for all addresses of a word. Schemes, users and passwords
# without spaces have no bound: beyond one they would be shown.
_SCHEME_END = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{0,60}\Z")
# A port before a path is no password, but where one word before it is likelier to be a user.
_NO_PORT = r"(?!\d{1,20}(?:[/?#'\",;)\]}>\s]|$))"
_USER_AND_PORT = r"(?!localhost:)[^\s/?#@.:'\"]++:\d{1,20}/"
# An address: up to the @, or to where the password begins. That may have a slash in it: no valid address, and common.
_USER = re.compile(rf"://(?:(?P<whole>[^\s/?#@]*+@)|[^\s/@:]*+:{_NO_PORT}|{_USER_AND_PORT})")
# An address without its scheme.
_BARE_USER = re.compile(r"(?<![\w:/])//[^\s/?#@:]*+:[^\s/?#@]*+@")
# An address at the beginning of a value, whose password may have spaces in it. It is looked for once.
_WHOLE_USER = re.compile(
    r"\s*+(?:[A-Za-z0-9+.\-]*+://|//(?=[^/?#@]*+:))"
    rf"(?P<user>(?:[^\0/?#@]{{0,16384}}|[^\0/@:]*+:{_NO_PORT}[^\0]{{0,16384}}|{_USER_AND_PORT}[^\0]{{0,16384}})@)"
)
# An address inside a text, whose password has spaces in it: these end at a later @ of the line. Where a whole address
# seems to end before the space, with a host that has a dot, a port or a path, what follows is text, not password.
_SPACED_USER = re.compile(rf"://[^\s/?#@:\[]++:{_NO_PORT}")
_AFTER_SPACE = re.compile(r"(?:[ \t][^\n@]{0,80}@[^\s@./:]{0,100}){0,4}[ \t][^\n@]{0,80}@(?=[\w\[])")
_END_OF_HOST = re.compile(r"[./:]")
_SPACE = re.compile(r"\s")
_KEY = (
    r"(?:api|access|account|auth|client|function|master|private|secret|shared|signing|subscription)[._\-]?key"
)
_WORD = rf"token|secret|pass(?:w(?:or)?d)?|pwd|jwt|signature|credential|{_KEY}"
_SECRET_NAME = re.compile(rf"{_WORD}|\A(?:sig|auth|key|code|pat|bearer)\Z", re.IGNORECASE)
# A name may be written with %, and so may what is before it; a value may have quotes inside.
_PARAMETER = re.compile(r"(?<![\w.\-%])(?P<word>[\w.\-%]++)=")
_SEPARATOR = re.compile(r"[?&;#]")
_VALUE = re.compile(r"[^&;#\s]*[^&;#\s'\"]")
# Of a connection string of a database: `password='x y z'`.
_SETTING = re.compile(
    r"(?P<name>(?<![\w.\-/?&;#%])(?:[\w.\-]*(?:pass(?:w(?:or)?d)|pwd|secret|token)\s*=\s*(?=['\"])"
    r"|(?:password|passwd|pwd)\s*=\s*))(?P<value>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^\s'\",;&)\]}]+)",
    re.IGNORECASE,
)
_FORMS = re.compile(
    r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w\-]{20,}|hf_[A-Za-z0-9]{30,}"
    r"|xox[abprs]-[\w\-]{10,})\b"
)
_VARIABLE = re.compile(r"passw(or)?d|token|secret|credential|api_?key|access_?key", re.IGNORECASE)
# A shorter value is likelier to be a word of the text than a secret.
_SHORTEST = 8


def redacted(text: str) -> str:
    """`text` without what may be a secret in it; `***` stands for each."""
    # Most texts have none of the marks, and this is called for every line of a log.
    if "//" in text and "@" in text:
        for users in _USERS:
            text = _hidden(text, users(text))
    if "=" in text:
        text = _without_parameters(text)
        text = _SETTING.sub(rf"\g<name>{HIDDEN}", text)
    text = _FORMS.sub(HIDDEN, text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _holds_secret(name):
            for form in _forms(value):
                text = text.replace(form, HIDDEN)
    return text


@lru_cache(maxsize=100)
def _forms(value: str) -> tuple[str, ...]:
    """A secret as it is, and as addresses have it: with or without %2F for a slash, and in both cases."""
    quoted = [how(value, safe=safe) for how in (quote, quote_plus) for safe in ("", "/")]
    lower = [re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), one) for one in quoted]
    return tuple(dict.fromkeys((value, *quoted, *lower)))


@cache
def _holds_secret(name: str) -> bool:
    """Whether a variable is called like a secret. The path of a file with a secret is none."""
    is_path = name.upper().endswith(("_FILE", "_PATH", "_DIR", "_CREDENTIALS"))
    return not is_path and _VARIABLE.search(name) is not None


def redacted_values(value: Any) -> Any:
    """The same for all texts in mappings and lists."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {name: redacted_values(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_values(item) for item in value]
    return value


def secret_in(text: str) -> str | None:
    """What kind of secret a text holds, in words; None if there is none. A user's name without a password is none."""
    for start, end in (span for users in _USERS for span in users(text)):
        user = text[start : end - 1]
        scheme = _SCHEME_END.search(text[max(0, start - 64) : max(0, start - 3)])
        is_database = scheme is not None and scheme[0].partition("+")[0] in ("postgresql", "mysql", "mssql")
        if user != HIDDEN and (":" in user or not is_database):
            return "user information"
    if _without_parameters(text) != text:
        return "a token or a signature"
    if any(found["value"] != HIDDEN for found in _SETTING.finditer(text)):
        return "a password"
    return "an access key or a token" if _FORMS.search(text) else None


def _hidden(text: str, spans: Iterable[tuple[int, int]]) -> str:
    kept, done = [], 0
    for start, end in spans:
        kept += [text[done:start], f"{HIDDEN}@"]
        done = end
    return "".join([*kept, text[done:]])


def _whole_user(text: str) -> Iterator[tuple[int, int]]:
    """Where user and password are, with the @ behind them, of an address that a value begins with."""
    if found := _WHOLE_USER.match(text):
        yield found.span("user")


def _spaced_users(text: str) -> Iterator[tuple[int, int]]:
    """The same of addresses inside a text, whose passwords have spaces in them."""
    at = word_end = last = -1
    rest: re.Match[str] | None = None
    while found := _SPACED_USER.search(text, max(at, 0)):
        at = found.end()
        if at > word_end:
            word_end, last = _word(text, at)
            rest = _AFTER_SPACE.match(text, word_end)
        seems_whole = last >= at and _END_OF_HOST.search(text, last, word_end)
        if rest and at < word_end and not seems_whole:
            yield found.start() + 3, rest.end()
            at = rest.end()


def _users(text: str) -> Iterator[tuple[int, int]]:
    """The same of addresses inside a text, whose passwords have none."""
    at = word_end = last = -1
    while found := _USER.search(text, max(at, 0)):
        at = found.end()
        if not found["whole"]:
            if at > word_end:
                word_end, last = _word(text, at)
            if last < at:
                continue
            at = last + 1
        yield found.start() + 3, at


def _bare_users(text: str) -> Iterator[tuple[int, int]]:
    for found in _BARE_USER.finditer(text):
        yield found.start() + 2, found.end()


def _word(text: str, at: int) -> tuple[int, int]:
    """The end of the word that goes on at `at`, and the last @ in it from there, -1 if there is none."""
    space = _SPACE.search(text, at)
    end = space.start() if space else len(text)
    return end, text.rfind("@", at, end)


# What one has hidden, the next one finds hidden.
_USERS = (_whole_user, _spaced_users, _users, _bare_users)


def _without_parameters(text: str) -> str:
    """`text` without the values of parameters that are secrets by their names."""
    kept, done = [], 0
    # The value of another one may be an address with parameters of its own: the search goes on inside it.
    for name in _PARAMETER.finditer(text):
        if name.start() < done:
            continue
        *before, word = _SEPARATOR.split(unquote(name["word"]))
        is_parameter = before or text[max(0, name.start() - 1) : name.start()] in ("?", "&", ";", "#")
        if not (is_parameter and _SECRET_NAME.search(word)):
            continue
        if value := _VALUE.match(text, name.end()):
            kept += [text[done : name.end()], HIDDEN]
            done = value.end()
    return "".join([*kept, text[done:]])
