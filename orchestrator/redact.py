"""What may be a secret in a text: found, so that it is refused, and taken out of whatever leaves the process.

Known are user information in addresses (`scheme://user:password@host`), values of parameters in addresses that are
called token, signature, password and the like, access keys and tokens in the forms of AWS, GitHub, GitLab, Hugging Face
and Slack, and the values of environment variables with such names. A password that stands alone under another name is
not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

# Also a password with a slash in it, which is no valid address and common; a port before a path is none.
_USER = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*://)(?:[^\s/?#@'\"]*@|[^\s/@'\"]*:(?!\d+(?:[/?#]|$))[^\s'\"]*@)"
)
_WORD = r"(?:token|secret|pass(?:w(?:or)?d)?|pwd|jwt|signature|credential|api[_\-]?key|access[_\-]?key)"
_PARAMETER = re.compile(
    rf"(?P<name>(?:[?&;#]|%3B)(?:[\w.\-]*{_WORD}[\w.\-]*|sig|auth|key|code)=)(?P<value>[^&;#\s'\"]+)",
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
    if "://" in text:
        text = _USER.sub(rf"\g<scheme>{HIDDEN}@", text)
    if "=" in text:
        text = _PARAMETER.sub(rf"\g<name>{HIDDEN}", text)
    text = _FORMS.sub(HIDDEN, text)
    for name, value in os.environ.items():
        # The path of a file with a secret is none.
        is_path = name.upper().endswith(("_FILE", "_PATH", "_DIR", "_CREDENTIALS"))
        if len(value) >= _SHORTEST and not is_path and value in text and _VARIABLE.search(name):
            text = text.replace(value, HIDDEN)
    return text


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
    for found in _USER.finditer(text):
        user = found[0].removeprefix(found["scheme"]).removesuffix("@")
        is_database = found["scheme"].partition("+")[0].partition(":")[0] in ("postgresql", "mysql", "mssql")
        if user != HIDDEN and (":" in user or not is_database):
            return "user information"
    if any(found["value"] != HIDDEN for found in _PARAMETER.finditer(text)):
        return "a token or a signature"
    return "an access key or a token" if _FORMS.search(text) else None
