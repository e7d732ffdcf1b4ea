"""Secrets inside free texts, and texts that are made to take long."""

from __future__ import annotations

import base64
import json
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from other_process import said_by

from orchestrator.pipeline.run.stage_log import stage_log
from orchestrator.redact import KeyBlocks, redacted, secret_in


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("db at postgres://u:p@ss w0rd@host", "db at postgres://***@host"),
        ("db at postgres://u:pass w0rd@host/x, fine", "db at postgres://***@host/x, fine"),
        ("db at postgres://u:a b c d@host", "db at postgres://***@host"),
        ("db at postgres://u:p@s s@x y@host/db", "db at postgres://***@host/db"),
        ("db at postgres://u:p w@[::1]:5432/db", "db at postgres://***@[::1]:5432/db"),
        ("first\ndb at postgres://u:p w@host\nlast", "first\ndb at postgres://***@host\nlast"),
    ],
)
def test_a_password_with_spaces_in_a_text_is_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown
    assert secret_in(text) == "user information"
    assert secret_in(shown) is None


@pytest.mark.parametrize(
    "text",
    [
        "see http://localhost:5000 or write to bob@example.com",
        "the bucket s3://photos/prefix is that of bob@example.com",
        "at http://host:8080/path, says bob@example.com",
        "read https://example.com/a:b and ask bob@example.com",
    ],
)
def test_an_address_and_a_mail_address_are_no_password(text: str) -> None:
    assert redacted(text) == text


def test_the_end_of_an_address_ends_the_password() -> None:
    text = "cannot reach postgres://u:p@db.example.com:5432/x for bob@example.com"
    assert redacted(text) == "cannot reach postgres://***@db.example.com:5432/x for bob@example.com"


@pytest.mark.parametrize(
    "before",
    [
        "\x1b[32m",
        "...",
        "1.",
        "2024-01-01-",
        "id=7",
        "\N{LATIN SMALL LETTER E WITH ACUTE}",
        "_",
        "7" * 100,
        "a" * 100,
    ],
)
@pytest.mark.parametrize("scheme", ["https", "postgres+psycopg2"])
def test_what_stands_before_an_address_does_not_matter(before: str, scheme: str) -> None:
    text = f"{before}{scheme}://u:pw@h"
    assert redacted(text) == f"{before}{scheme}://***@h"
    assert secret_in(text) == "user information"


@pytest.mark.parametrize(
    "text",
    [
        f"at {'s' * 5000}://u:hush@h",
        f"at {'7' * 5000}://u:hush@h",
        f"at https://{'u' * 5000}:hush@h",
        f"at https://{'u' * 5000}:hu/hush@h",
        f"at https://{'u' * 5000}:80/hush@h",
        f"at https://{'u' * 5000}:hu hush@h",
        f"at https://u:{'hush' * 5000}@h",
        f"at https://u:{'hush' * 5000}/x@h",
        f"at https://u:{'hush' * 5000} x@h",
        f"at https://{'hush' * 5000}@h",
        f"at //u:{'hush' * 5000}@h",
        f"at //{'u' * 5000}:hush@h",
        f"https://u:hush {'hush' * 3000}/x@h",
        f"at https://h/?{'x' * 5000}token=hush",
        f"at https://h/?{'x%2D' * 5000}token=hush",
        f"at https://h/?token{'x' * 5000}=hush",
        f"at https://h/?token={'hush' * 5000}",
        "at https://h/?a%3Btoken=hush",
        "%3Btoken=hush",
    ],
    ids=lambda text: text[:20],
)
def test_no_length_shows_a_secret(text: str) -> None:
    assert "hush" not in redacted(text)
    assert "***" in redacted(text)
    assert secret_in(text) is not None


def test_parameters_in_parameters_are_found_at_any_depth() -> None:
    deep = "http://a/?u=" * 2000 + "http://b/?token=hush&x=1"
    assert redacted(deep) == deep.replace("hush", "***")


@pytest.mark.parametrize(
    "form",
    [
        "hush & h@sh/1",
        "hush%20%26%20h%40sh%2F1",
        "hush+%26+h%40sh%2F1",
        "hush%20%26%20h%40sh%2f1",
        "hush%20%26%20h%40sh/1",
        "hush+%26+h%40sh/1",
    ],
    ids=["plain", "quoted", "plus", "lower case", "slash", "plus and slash"],
)
def test_a_secret_of_the_environment_is_hidden_as_an_address_has_it_too(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("SHOP_DB_PASSWORD", "hush & h@sh/1")
    assert redacted(f"refused {form} today") == "refused *** today"
    monkeypatch.setenv("SHOP_DB_PASSWORD_FILE", "/run/secrets/db")
    assert redacted("read /run/secrets/db") == "read /run/secrets/db"


VALUE = "hu\"sh\\ 'x'\nhush-9$"


def _shown(text: str, *secrets: str) -> str:
    shown = redacted(text)
    assert "***" in shown
    assert not [secret for secret in secrets if secret in shown], shown
    assert redacted(shown) == shown
    return shown


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GCP_CREDENTIALS", '{"type": "service_account", "private_key": "hush-hush-1"}'),
        ("GCP_CREDENTIALS", "user:hush-hush-1"),
        ("SHOP_PWD", "hush-hush"),
        ("GPG_PASSPHRASE", "a long hush"),
        ("AZURE_DEVOPS_PAT", "hush1234hush"),
        ("GITHUB_APP_PRIVATE_KEY", "hush-hush-hush-hush"),
        ("ENCRYPTION_KEY", "hushhushhushhushhush"),
        ("AZURE_STORAGE_KEY", "aHVzaA1/+hush=="),
        ("SMTP_PASS", "hush-hush"),
    ],
)
def test_variables_that_are_called_like_secrets_are_hidden(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert redacted(f"refused {value} today") == "refused *** today"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/my key.json"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "keys/gcp.json"),
        ("SSH_PRIVATE_KEY", "~/.ssh/id_rsa"),
        ("OLDPWD", "/home/me/photos"),
        ("LAST_PWD", "/home/me/photos"),
        ("SORT_KEY", "created_at"),
        ("CACHE_KEY", "photos"),
        ("SHOP_PWD", "short"),
    ],
)
def test_paths_and_words_in_such_variables_are_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert redacted(f"read {value} today") == f"read {value} today"


def _in_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "text",
    [
        VALUE,
        repr(VALUE),
        repr([VALUE]),
        repr(RuntimeError(VALUE)),
        repr(VALUE.encode()),
        json.dumps({"a": VALUE}),
        json.dumps({"a": repr(VALUE)}),
        shlex.quote(VALUE),
        _in_base64(VALUE),
        *(_in_base64(f"{user}:{VALUE}") for user in ("bob", "me", "anna", "")),
        base64.urlsafe_b64encode(VALUE.encode()).decode(),
    ],
)
def test_a_secret_of_the_environment_is_hidden_in_quotes_and_base64(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("SHOP_DB_PASSWORD", VALUE)
    shown = redacted(f"refused {text} today")
    assert "***" in shown
    assert "hush" not in shown
    assert text[4:-6] not in shown
    assert len(shown) < len("refused  today") + 30


def test_the_lines_and_fields_of_a_secret_are_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPLOY_SECRET", "hush-line-number-one\nhush-line-number-two")
    assert redacted("it is hush-line-number-two") == "it is ***"
    monkeypatch.setenv(
        "GCP_CREDENTIALS", json.dumps({"type": "a service account", "private_key": "hush-hush-hush"})
    )
    assert redacted("a service account has hush-hush-hush") == "a service account has ***"


FREE = [
    "Authorization: Bearer hush.hush-hush_hush",
    "Authorization: Basic aHVzaDpodXNoaHVzaA==",
    "{'Authorization': 'Bearer hushhush'}",
    '{"authorization": "token hushhush1"}',
    "sent Bearer hush1hushhushhushhush to it",
    "-H 'Basic aHVzaDpodXNoaHVzaA=='",
    '{"password": "hush"}',
    "{'db_password': 'hu\\'sh hush'}",
    r'"{\"password\": \"hush hush\"}"',
    '{"api_key": "hushhush1"}',
    "password: hush-hush",
    "  DB_PASSWORD: hush1",
    "tool --password hush-hush --force",
    "tool --password=hush",
    "tool --db-password 'hush hush'",
    "tool --token hushhush1",
    "token=hushhush1hush",
    "api_key=hushhush1",
    "client_secret: hush-hush-hush",
    "x-api-key: hushhush1",
]


@pytest.mark.parametrize("text", FREE)
def test_what_a_text_gives_for_a_secret_is_hidden(text: str) -> None:
    shown = _shown(text, "hush", "aHVzaDpodXNoaHVzaA")
    assert shown.startswith(text[:2])


@pytest.mark.parametrize(
    "secret",
    [
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
        "sk-" + "proj-" + "hush1" * 6,
        "AIza" + "hush_" * 7,
        "npm_" + "hush1" * 7,
        "ghp_" + "hush1" * 7,
        "github_pat_" + "hush1" * 7,
        "xoxb-" + "12345-hush",
        "hf_" + "hush1" * 7,
        "AKIA" + "ABCDEFGHIJKLMNOP",
        "services/" + "T0/B0/hush",
    ],
)
def test_tokens_of_well_known_services_are_hidden(secret: str) -> None:
    before = "https://hooks.slack.com/" if secret.startswith("services") else "it had "
    assert redacted(f"{before}{secret} in it") == f"{before}*** in it"
    assert secret_in(f"{before}{secret}") == "an access key or a token"


LINE = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj"


@pytest.mark.parametrize(
    "kind", ["PRIVATE KEY", "RSA PRIVATE KEY", "OPENSSH PRIVATE KEY", "PGP PRIVATE KEY BLOCK"]
)
def test_the_inside_of_a_private_key_is_hidden(kind: str) -> None:
    begin, end = f"-----BEGIN {kind}-----", f"-----END {kind}-----"
    assert redacted(f"a {begin}\n{LINE}\nhush==\n{end} b") == f"a {begin}***{end} b"
    assert redacted(repr(f"{begin}\n{LINE}\nhush==\n{end}\n")) == f"'{begin}***{end}\\n'"
    assert redacted(f"a {begin}\n{LINE}\nhu") == f"a {begin}***"
    assert redacted(f"10:52 INFO {LINE}") == "10:52 INFO ***"
    public = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"
    assert redacted(public) == public


def test_a_key_that_is_logged_line_by_line_is_hidden(tmp_path: Path) -> None:
    lines = ["-----BEGIN PRIVATE KEY-----", LINE, "short", "hu==", "-----END PRIVATE KEY-----", "after"]
    with stage_log(tmp_path / "log", "t") as log:
        for line in ["before", *lines]:
            log.info(line)
    said = [line.rpartition(": ")[2] for line in (tmp_path / "log").read_text().splitlines()[1:]]
    assert said == ["before", lines[0] + "***", "***", "***", "***", lines[4], "after"]


def test_only_words_inside_a_key_are_its_lines() -> None:
    keys = KeyBlocks()
    assert not keys.hides("word")
    assert not keys.hides("-----BEGIN PRIVATE KEY-----")
    assert not keys.hides("step 3 is done")
    assert keys.hides("aGk=")
    # A key without an end.
    assert [keys.hides("word") for _ in range(400)][-1] is False


@pytest.mark.parametrize(
    "text",
    [
        "tokens: 197",
        "max_tokens=77 token=12 tokens_per_s=12.5",
        "loss_per_token=1.2345678 token: 3.5e-05",
        "key abc123",
        "artifact 0123456789abcdef is there",
        "cache_key=0123456789abcdef key: 0123456789abcdef",
        "sha256 " + "0123456789abcdef" * 4,
        "tracking.password: extra inputs are not permitted",
        "elastic.token: unknown key",
        "a password is not allowed here; set MLFLOW_TRACKING_PASSWORD",
        "set the password with --password or in the environment",
        'end_token: "<|endoftext|>"',
        "Basic authentication was refused by the bearer of the certificate",
        "authorization: refused by the server",
        "token=self._token, api_key=settings.key, secret=os.environ['A']",
        "ssh_private_key: ~/.ssh/KEY.pem",
        "s3://bucket/token=3/part-000001",
        "risk-adjusted-return-of-a-portfolio-1",
    ],
)
def test_ordinary_texts_stay_as_they_are(text: str) -> None:
    assert redacted(text) == text


HOSTILE = {
    "headers": "'Authorization: ' * 14_000",
    "bearers": "'Bearer ' * 28_000",
    "basics": "'Basic ' + 'a' * 200_000",
    "begins": "'-----BEGIN PRIVATE KEY----- ' * 7_000",
    "ends": "'-----END PRIVATE KEY-----' * 8_000",
    "dashes": "'-----BEGIN ' * 18_000",
    "quotes": "'password: \"' * 18_000",
    "apostrophes": "'password: \\'' * 18_000",
    "options": "'--password ' * 18_000",
    "hyphens": "'-' * 200_000 + ' password x'",
    "passwords": "'password' * 25_000",
    "tokens": "'token=' * 33_000",
    "webs": "'eyJ' * 66_000",
    "dotted webs": "'eyJaaaaaaaa.' * 16_000",
    "dashed webs": "'-eyJ' * 50_000",
    "prefixes": "'sk-' + '-' * 200_000",
    "many prefixes": "'sk-a ' * 40_000",
    "slack": "'hooks.slack.com/services/' * 8_000",
    "base64": "'aA1' * 66_000",
    "lines": "('aA1' * 21 + 'b ') * 3_000",
    "spaces": "'password' + ' ' * 200_000",
}


# Each is a text and what is left of it.
LONG = {
    "schemes": ("'a://u:' * 20_000", "'a://u:' * 20_000"),
    "schemes with @": ("'a://u:' * 20_000 + 'x@h'", "'a://***@h'"),
    "ports": ("'a://u:80/' * 20_000", "'a://u:80/' * 20_000"),
    "spaced": ("'a://u:' * 20_000 + 'x y@h'", "'a://***@h'"),
    "letters": ("'a://' + 'u' * 200_000", "'a://' + 'u' * 200_000"),
    "words": ("'see a://u:x ' + 'b' * 200_000", "'see a://u:x ' + 'b' * 200_000"),
    "one word": ("'b' * 200_000 + '://u:x@h'", "'b' * 200_000 + '://***@h'"),
    "colons": ("'a://' + ':' * 100_000", "'a://' + ':' * 100_000"),
    "slashes": ("'/' * 200_000", "'/' * 200_000"),
    "names": ("'?a=' * 20_000", "'?a=' * 20_000"),
    "one name": ("'?' + 'a' * 200_000 + '&token=x'", "'?' + 'a' * 200_000 + '&token=***'"),
    "quoted names": ("'%3B' * 70_000 + 'token=x'", "'%3B' * 70_000 + 'token=***'"),
    "signs": ("'see a://u:x ' + '@ ' * 50_000", "'see a://u:x ' + '@ ' * 50_000"),
}


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """A killed process is the failure: some of these took hours."""
    hostile = {
        name: f"from orchestrator.redact import redacted; redacted('@ = // ' + {text} + ' =')"
        for name, text in HOSTILE.items()
    }
    long = {
        name: f"""
from orchestrator.redact import redacted, secret_in
text = 'x @ = // \\n' + {text} + ' ='
assert redacted(text) == 'x @ = // \\n' + {left} + ' =', redacted(text)[:200]
secret_in(text)
"""
        for name, (text, left) in LONG.items()
    }
    return said_by(hostile | long, 20)


@pytest.mark.parametrize("name", [*HOSTILE, *LONG])
def test_no_text_takes_long(name: str, said: dict[str, str]) -> None:
    assert said[name] == ""


def test_what_takes_long_or_fails_is_said() -> None:
    programs = {"endless": "while True: pass", "wrong": "assert 1 == 2", "right": "assert True"}
    said = said_by(programs, 1)
    assert said["endless"] == "it did not end within 1 s (exit code -14)"
    assert "AssertionError" in said["wrong"]
    assert said["right"] == ""
