"""What may be a secret in a text: found, so that it is refused, and taken out of whatever leaves the process.

Known are user information in addresses (`scheme://user:password@host`), values of parameters in addresses that are
called token, signature, password and the like, the password of a database's connection string, what a text gives for
such a name (`"password": "…"`, `--token …`), headers of authorization, private keys, access keys and tokens in the
forms of well-known services, and the values of environment variables with such names, also quoted and in Base64. A
password that stands alone under another name is not.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"

# Texts of any kind and length come by here, so the time grows in proportion to the text. What repeats either ends where
# the next address begins, or is bounded, or is measured once for all addresses of a word. Schemes, users and passwords
# without spaces have no bound: beyond one they would be shown.
_SCHEME_END = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{0,60}\Z")
# A port before a path is not a password, but where one word before it is likelier to be a user.
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
    r"|xox[abeprs]-[\w\-]{10,}|npm_[A-Za-z0-9]{30,})\b"
    r"|(?<![\w\-])(?:AIza[\w\-]{35}|sk-(?=[\w\-]{0,200}\d)[\w\-]{20,}|[rs]k_(?:live|test)_[A-Za-z0-9]{16,}|pypi-[\w\-]{40,}"
    r"|eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*)"
    r"|(?<=hooks\.slack\.com/)(?:services|workflows|triggers)/[\w\-/]{8,}"
)
# What a header hands over: `Authorization: Bearer …`, and without the header's name.
_HEADER = re.compile(
    r"(?P<name>\bauthorization\\{0,4}['\"]?\s{0,3}[:=,]\s{0,3}(?:\\{0,4}['\"])?)"
    r"(?P<scheme>(?:bearer|basic|token|digest|apikey|negotiate|aws4-hmac-sha256)\s{1,3})?(?P<value>[^\s'\"\\]{6,})",
    re.IGNORECASE,
)
_SCHEME_AND_TOKEN = re.compile(
    r"(?P<scheme>\b(?:(?P<basic>basic)|bearer)\s{1,3})(?P<value>[\w.~+/\-]{8,}={0,2})", re.IGNORECASE
)
_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
# A line of a key on its own has one of the widths that RFC 7468, OpenSSH and MIME break lines at.
_KEY_LINE = re.compile(
    r"(?<!\S)(?=\S{0,75}[a-z])(?=\S{0,75}[A-Z])(?=\S{0,75}\d)[A-Za-z0-9+/]{64}(?:[A-Za-z0-9+/]{6}){0,2}(?!\S)"
)
# A tokenizer's own tokens are settings of a pipeline.
_NO_SPECIAL = "".join(
    f"(?<!{name}_)" for name in ("start", "end", "bos", "eos", "unk", "pad", "sep", "cls", "mask")
)
_INSIDE = re.compile(r"[A-Za-z0-9+/]{1,100}={0,2}")
# A key of 16,384 bits has fewer lines.
_KEY_LINES = 300
# What a name that ends so is given in free text: in JSON, in YAML, behind an option.
_GIVEN = re.compile(
    rf"(?<!/)(?P<word>pass(?:word|wd|phrase)|pwd|secret|{_NO_SPECIAL}token|{_KEY}|apikey)"
    r"(?P<sep>\\{0,4}['\"]?[ \t]{0,3}(?::|=>|=)[ \t]{0,3}|[ \t]{1,3})"
    r"(?:(?P<quote>\\{0,4}['\"])(?P<quoted>[^\n]{1,2000}?)(?<!\\)(?P=quote)|(?P<bare>[^\s'\",;&)\]}\\]+))",
    re.IGNORECASE,
)
_OPTION = re.compile(r"(?<![\w\-])--?[\w.\-]{0,60}\Z")
_PLAIN = re.compile(r"[A-Za-z]?[a-z]{0,15}[.:!?]?|[<{$%]\S*[>}]?|\W*", re.DOTALL)
# A line of a program, in a traceback.
_CODE = re.compile(r"[A-Za-z_][\w.]{0,200}[(\[]\S*|[a-z_]{1,40}(?:\.[a-z_]{1,40}){1,5}")
_NUMBER = re.compile(r"[\d.,_eE+\-]{1,15}[%a-z/]{0,5}[.:]?")
_VARIABLE = re.compile(
    r"passw(or)?d|passphrase|token|secret|credential|api_?key|access_?key|_pass$|_pwd$", re.IGNORECASE
)
# These names are common for other things, too: a path or a word is not a secret in them.
_MAYBE_VARIABLE = re.compile(r"private_?key|_key$|^pat$|_pat$|_credentials$|_pwd$", re.IGNORECASE)
_PATH = re.compile(
    r"(?:~|\.{1,2})?(?:/[\w.\- ]+)+/?|[A-Za-z]:[\\/][^\n\"{]*"
    r"|[\w.\-/]{1,200}\.(?:json|pem|key|p12|pfx|crt|cer|txt|ya?ml|toml|ini)"
)
# A shorter value is likelier to be a word of the text than a secret.
_SHORTEST = 8
_SHORTEST_WORDS = 16


def redacted(text: str) -> str:
    """`text` without what may be a secret in it; `***` stands for each."""
    # As wholes, before a part of one is taken for something else.
    for form in _environment():
        text = text.replace(form, HIDDEN)
    # Most texts have none of the marks, and this is called for every line of a log.
    if "-----BEGIN" in text or "-----END" in text:
        text = _without_keys(text)
    if "//" in text and "@" in text:
        for users in _USERS:
            text = _hidden(text, users(text))
    if "=" in text:
        text = _without_parameters(text)
        text = _SETTING.sub(rf"\g<name>{HIDDEN}", text)
    text = _FORMS.sub(HIDDEN, text)
    text = _HEADER.sub(_without_header, text)
    text = _SCHEME_AND_TOKEN.sub(_without_token, text)
    text = _KEY_LINE.sub(HIDDEN, text)
    return _GIVEN.sub(_without_given, text)


def _environment() -> list[str]:
    """What the secrets of the environment look like in texts, the longest first."""
    found = {
        form
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _holds_secret(name, value)
        for form in _forms(value)
    }
    return sorted(found, key=len, reverse=True)


@lru_cache(maxsize=1024)
def _holds_secret(name: str, value: str) -> bool:
    """Whether a variable is called like a secret. The path of a file with a secret is none."""
    if name.upper().endswith(("_FILE", "_PATH", "_DIR")) or name.upper() in ("PWD", "OLDPWD"):
        return False
    if _MAYBE_VARIABLE.search(name):
        is_sure = _VARIABLE.search(name) is not None and not name.upper().endswith(("_CREDENTIALS", "_PWD"))
        has_both = re.search(r"\d", value) is not None and re.search(r"[^\W\d]", value) is not None
        is_word = len(value) < _SHORTEST_WORDS and not has_both
        return is_sure or not (_PATH.fullmatch(value) or (_VARIABLE.search(name) is None and is_word))
    return _VARIABLE.search(name) is not None


@lru_cache(maxsize=256)
def _forms(value: str) -> tuple[str, ...]:
    """How a secret may stand in a text: as it is, quoted for Python, JSON, a shell or an address, and in Base64.

    Of a secret of several lines each long one is a secret, and of one in JSON what its fields with secret names have.
    """
    found = set()
    for part in (value, *_parts(value)):
        by_repr, by_json = repr(part)[1:-1], json.dumps(part)[1:-1]
        raw = part.encode("utf-8", "surrogateescape")
        found |= {part, by_repr, by_json, json.dumps(part, ensure_ascii=False)[1:-1], repr(raw)[2:-1]}
        # An error's text inside another one's.
        found |= {repr(by_repr)[1:-1], json.dumps(by_json)[1:-1], json.dumps(by_repr)[1:-1]}
        found |= {part.replace("'", escaped) for escaped in ("'\"'\"'", "'\\''", "\\'")} | {
            part.replace('"', '\\"')
        }
        found |= {re.sub(r"([\\\"$`])", r"\\\1", part), re.sub(r"([^\w@%+=:,./\-])", r"\\\1", part)}
        # With or without %2F for a slash, and in both cases.
        quoted = {how(raw, safe=safe) for how in (quote, quote_plus) for safe in ("", "/")}
        found |= quoted | {re.sub("%[0-9A-F]{2}", lambda code: code[0].lower(), one) for one in quoted}
        # `user:password` is encoded as one: three bytes are four characters, wherever the secret begins in them.
        for before in range(3):
            bits = 8 * before
            padded = base64.b64encode(b"\0" * before + raw).decode().rstrip("=")
            whole = padded[-(-bits // 6) : (bits + 8 * len(raw)) // 6]
            found |= {whole, whole.translate(str.maketrans("+/", "-_"))}
        found |= {base64.b64encode(raw).decode(), base64.urlsafe_b64encode(raw).decode()}
    return tuple(form for form in found if len(form) >= _SHORTEST)


def _parts(value: str) -> Iterator[str]:
    if "\n" in value:
        lines = (line.strip() for line in value.splitlines())
        yield from (line for line in lines if len(line) >= _SHORTEST_WORDS and not line.startswith("-----"))
    if value.lstrip().startswith(("{", "[")):
        try:
            yield from _secret_fields(json.loads(value))
        except (ValueError, RecursionError):
            return


def _secret_fields(data: Any) -> Iterator[str]:
    for name, item in data.items() if isinstance(data, dict) else ():
        if isinstance(item, str) and len(item) >= _SHORTEST and _SECRET_NAME.fullmatch(name):
            yield item
            yield from (
                line for line in item.splitlines() if len(line) >= _SHORTEST_WORDS and "-----" not in line
            )
    for item in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from _secret_fields(item)


def _without_keys(text: str) -> str:
    """`text` without the inside of private keys. One that has no end goes on to the end of the text."""
    kept, done = [], 0
    while begin := _BEGIN.search(text, done):
        end = _END.search(text, begin.end())
        kept += [text[done : begin.end()], HIDDEN]
        done = end.start() if end else len(text)
        if not end:
            break
    return "".join([*kept, text[done:]])


def _without_header(found: re.Match[str]) -> str:
    if not found["scheme"] and len(found["value"]) < _SHORTEST_WORDS:
        return found[0]
    return f"{found['name']}{found['scheme'] or ''}{HIDDEN}"


def _without_token(found: re.Match[str]) -> str:
    value = found["value"]
    if found["basic"]:
        try:
            is_secret = b":" in base64.b64decode(value + "=" * (-len(value) % 4), altchars=b"-_")
        except ValueError:
            is_secret = False
    else:
        is_secret = len(value) >= _SHORTEST_WORDS and re.search(r"\d", value) is not None
    return f"{found['scheme']}{HIDDEN}" if is_secret else found[0]


def _without_given(found: re.Match[str]) -> str:
    is_password = found["word"].lower().startswith(("pass", "pwd"))
    sign = found["sep"].strip("\\'\" \t")
    if not sign:
        before = found.string[max(0, found.start() - 64) : found.start()]
        if not _OPTION.search(before):
            return found[0]
    value = found["quoted"] or found["bare"]
    if value.startswith((HIDDEN, "…")):
        return found[0]
    is_free = found["quoted"] is None and not (is_password and sign == "=")
    if len(value) < (_SHORTEST if not is_password else 4 if is_free else 1):
        return found[0]
    if is_free and _PLAIN.fullmatch(value):
        return found[0]
    if not is_password and (_NUMBER.fullmatch(value) or _CODE.fullmatch(value) or _PATH.fullmatch(value)):
        return found[0]
    mark = found["quote"] or ""
    return f"{found['word']}{found['sep']}{mark}{HIDDEN}{mark}"


class KeyBlocks:
    """Finds the lines of private keys among messages that come one by one."""

    def __init__(self) -> None:
        self._left = 0

    def hides(self, message: str) -> bool:
        """Whether a message is a line inside a key. All messages are to be shown to this, in their order."""
        begins = [found.end() for found in _BEGIN.finditer(message)]
        if begins:
            self._left = 0 if _END.search(message, begins[-1]) else _KEY_LINES
            return False
        if _END.search(message):
            self._left = 0
        self._left = max(0, self._left - 1)
        return self._left > 0 and _INSIDE.fullmatch(message.strip()) is not None


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
