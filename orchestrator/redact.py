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
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"

# Everything that repeats is bounded, and begins where a word does: texts of any kind and length come by here.
_SCHEME = r"(?<![A-Za-z0-9+.\-])[A-Za-z][A-Za-z0-9+.\-]{0,60}://"
# A port before a path is no password, but where one word before it is likelier to be a user.
_NO_PORT = r"(?!\d{1,20}(?:[/?#'\",;)\]}>\s]|$))"


def _user_part(space: str) -> str:
    """User and password up to the @, also a password with a slash in it: no valid address, and common."""
    return (
        rf"(?:[^{space}/?#@]{{0,2000}}|[^{space}/@:]{{0,200}}:{_NO_PORT}[^{space}]{{0,2000}}"
        rf"|(?!localhost:)[^\s/?#@.:'\"]{{1,200}}:\d{{1,20}}/[^{space}]{{0,2000}})@"
    )


_USER = re.compile(rf"(?P<scheme>{_SCHEME})" + _user_part(r"\s"))
# An address without its scheme.
_BARE_USER = re.compile(r"(?P<scheme>(?<![\w:/])//)[^\s/?#@:]{0,200}:[^\s/?#@]{0,2000}@")
# An address at the beginning of a value, whose password may have spaces in it.
_WHOLE_USER = re.compile(rf"\s*(?P<scheme>{_SCHEME}|//(?=[^/?#@]{{0,200}}:))" + _user_part(r"\0"))
# An address inside a text, whose password has spaces in it: these end at a later @ of the line. Where a whole address
# seems to end before the space, with a host that has a dot, a port or a path, what follows is text, not password.
_SPACED_USER = re.compile(
    rf"(?P<scheme>{_SCHEME})[^\s/?#@:\[]{{1,100}}:{_NO_PORT}"
    r"(?:[^\s@]{1,100}|(?:[^\s@]{0,100}@){1,5}[^\s@./:]{0,100})"
    r"(?:[ \t][^\n@]{0,80}@[^\s@./:]{0,100}){0,4}[ \t][^\n@]{0,80}@(?=[\w\[])"
)
_KEY = (
    r"(?:api|access|account|auth|client|function|master|private|secret|shared|signing|subscription)[._\-]?key"
)
_WORD = rf"token|secret|pass(?:w(?:or)?d)?|pwd|jwt|signature|credential|{_KEY}"
_SECRET_NAME = re.compile(rf"[\w.\-]*(?:{_WORD})[\w.\-]*|sig|auth|key|code|pat|bearer", re.IGNORECASE)
# A name may be written with %, a value may have quotes inside.
_PARAMETER = re.compile(r"(?:[?&;#]|%3B)(?P<word>[\w.\-%]{1,200})=", re.IGNORECASE)
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
        text = _WHOLE_USER.sub(rf"\g<scheme>{HIDDEN}@", text, count=1) if _WHOLE_USER.match(text) else text
        text = _SPACED_USER.sub(rf"\g<scheme>{HIDDEN}@", text)
        text = _USER.sub(rf"\g<scheme>{HIDDEN}@", text)
        text = _BARE_USER.sub(rf"\g<scheme>{HIDDEN}@", text)
    if "=" in text:
        text = _without_parameters(text)
        text = _SETTING.sub(rf"\g<name>{HIDDEN}", text)
    text = _FORMS.sub(HIDDEN, text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _holds_secret(name):
            # As it is, and as an address has it.
            for form in (value, quote(value, safe=""), quote_plus(value)):
                text = text.replace(form, HIDDEN)
    return text


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
    whole = _WHOLE_USER.match(text)
    patterns = (_SPACED_USER, _USER, _BARE_USER)
    users = [*([whole] if whole else ()), *(found for one in patterns for found in one.finditer(text))]
    for found in users:
        user = found[0].strip().removeprefix(found["scheme"]).removesuffix("@")
        is_database = found["scheme"].partition("+")[0].partition(":")[0] in ("postgresql", "mysql", "mssql")
        if user != HIDDEN and (":" in user or not is_database):
            return "user information"
    if _without_parameters(text) != text:
        return "a token or a signature"
    if any(found["value"] != HIDDEN for found in _SETTING.finditer(text)):
        return "a password"
    return "an access key or a token" if _FORMS.search(text) else None


def _without_parameters(text: str) -> str:
    """`text` without the values of parameters that are secrets by their names."""
    kept, done = [], 0
    # The value of another one may be an address with parameters of its own: the search goes on inside it.
    for name in _PARAMETER.finditer(text):
        if name.start() < done or not _SECRET_NAME.fullmatch(unquote(name["word"])):
            continue
        if value := _VALUE.match(text, name.end()):
            kept += [text[done : name.end()], HIDDEN]
            done = value.end()
    return "".join([*kept, text[done:]])
