"""Names out of a store become paths inside their folder, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import UserError
from orchestrator.names import BadNameError, inside, is_name, parts_of

HOSTILE = [
    "", "/etc/passwd", "//host/share", "..", "../x", "a/../x", "a/..", "./a", "a/.", "a//b", "a/", "C:\\x", "C:/x",
    "c:x", "a\\b", "\\\\host\\share", "a\0b", "a\nb", "\x7f", "\ud800", "x" * 256, "é" * 128, "/".join(["x" * 200] * 6),
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    assert not is_name(name)
    with pytest.raises(BadNameError, match="not an object name") as caught:
        inside(tmp_path, name)
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a", "a/b.c", "..a/b..", "a b/ü/日本", "x" * 255, "~/x", "$HOME", "-rf"])
def test_others_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    assert parts_of(name) == tuple(name.split("/"))
    assert inside(tmp_path, name) == tmp_path / name


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "out").symlink_to(outside)
    (folder / "in").mkdir()
    (folder / "alias").symlink_to(folder / "in")
    assert inside(folder, "alias/x") == folder / "alias" / "x"
    for name in ("out", "out/x"):
        with pytest.raises(BadNameError, match="by a link"):
            inside(folder, name)


@pytest.mark.heavy
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["..", ".", "", "/", "a", "\\", "C:", "\0", "é", "..."]), max_size=6).map(
        "/".join
    )
)
def test_no_name_leads_out(name: str) -> None:
    folder = Path("/nowhere/folder")
    try:
        path = inside(folder, name)
    except BadNameError:
        return
    assert path.resolve().is_relative_to(folder)
    assert path.relative_to(folder).as_posix() == name
