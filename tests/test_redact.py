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


@pytest.mark.parametrize("name", LONG)
def test_no_text_takes_long(name: str) -> None:
    """A killed process is the failure: some of these took hours."""
    text, left = LONG[name]
    program = f"""
from orchestrator.redact import redacted, secret_in
text = 'x @ = // \\n' + {text} + ' ='
assert redacted(text) == 'x @ = // \\n' + {left} + ' =', redacted(text)[:200]
secret_in(text)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=20)
