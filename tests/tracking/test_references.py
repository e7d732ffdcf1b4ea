"""One spelling of registered models: what it means, and where a path could be meant instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.tracking.references import parsed, registered


@pytest.mark.parametrize(
    ("text", "name", "alias", "version"),
    [
        ("vit", "vit", None, None),
        ("vit@champion", "vit", "champion", None),
        ("vit:3", "vit", None, "3"),
        ("vit/3", "vit", None, "3"),
        ("models:/vit", "vit", None, None),
        ("models:/vit/3", "vit", None, "3"),
        ("models:/vit@champion", "vit", "champion", None),
        ("vit:latest", "vit", None, "latest"),
    ],
)
def test_a_spelling_has_one_meaning(text: str, name: str, alias: str | None, version: str | None) -> None:
    found = parsed(text)
    assert (found.name, found.alias, found.version, found.text) == (name, alias, version, text)
    assert found.is_whole
    assert found.is_bare == (alias is None and version is None)


@pytest.mark.parametrize(
    "text", ["", "vit@", "vit:", "@champion", ":3", "a/b/c", "a@b@c", "models:/", "../x@y", "a\\b@c"]
)
def test_what_no_registry_can_have_is_not_whole(text: str) -> None:
    assert not parsed(text).is_whole


@pytest.mark.parametrize(
    "text", ["a/b", "vit/3", "./vit@best", "../x", "~/vit@best", "~vit", "", "s3://a/b", "a\\b@c"]
)
def test_a_path_is_a_path(text: str) -> None:
    assert registered(text) is None


def test_where_both_could_be_meant_nothing_is_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("vit@best", "vit:3", "models:/vit@best", "models:/vit/3"):
        found = registered(text)
        assert found is not None
        assert found.name == "vit"
    for text, what in (("vit@best", "a folder"), ("vit:3", "a file")):
        Path(text).mkdir() if what == "a folder" else Path(text).touch()
        with pytest.raises(UserError, match=f"spelling, and there is {what} of that name here") as caught:
            registered(text)
        hint = caught.value.hint or ""
        assert f"./{text}" in hint
        assert registered(f"./{text}") is None
        assert registered(f"models:/{text}") == parsed(f"models:/{text}")
        assert f"models:/{text}" in hint
    Path("vit").mkdir()
    bare = registered("vit")
    assert bare is not None
    assert bare.is_bare, "what is here is the caller's to look at"
