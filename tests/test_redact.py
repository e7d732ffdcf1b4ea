"""Secrets inside free texts, and texts that are made to take long."""

from __future__ import annotations

import subprocess
import sys

import pytest

from orchestrator.redact import redacted, secret_in


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


def test_parameters_in_parameters_are_found_at_any_depth() -> None:
    deep = "http://a/?u=" * 2000 + "http://b/?token=hush&x=1"
    assert redacted(deep) == deep.replace("hush", "***")


@pytest.mark.parametrize(
    "form",
    ["hush & h@sh/1", "hush%20%26%20h%40sh%2F1", "hush+%26+h%40sh%2F1"],
    ids=["plain", "quoted", "plus"],
)
def test_a_secret_of_the_environment_is_hidden_as_an_address_has_it_too(
    monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("SHOP_DB_PASSWORD", "hush & h@sh/1")
    assert redacted(f"refused {form} today") == "refused *** today"
    monkeypatch.setenv("SHOP_DB_PASSWORD_FILE", "/run/secrets/db")
    assert redacted("read /run/secrets/db") == "read /run/secrets/db"


LONG = {
    "schemes": "'a://u:' * 20_000",
    "letters": "'a://' + 'u' * 200_000",
    "words": "'see a://u:x ' + 'b' * 200_000",
    "colons": "'a://' + ':' * 100_000",
    "names": "'?a=' * 20_000",
    "signs": "'see a://u:x ' + '@ ' * 50_000",
}


@pytest.mark.parametrize("name", LONG)
def test_no_text_takes_long(name: str) -> None:
    """A killed process is the failure: some of these took hours."""
    program = f"from orchestrator.redact import redacted; redacted('@ = // ' + {LONG[name]} + ' =')"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
