"""The documentation site builds without a warning, holds every page, and loads nothing from another server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a page loads by itself; links that a reader may follow are none of it.
_LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?([^\s\">]+)|<link\b[^>]*>")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the lock's mkdocs-material is not installed: make setup-dev")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_there(site: Path) -> None:
    """A page that the navigation leaves out is a warning, and so a failed build."""
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page.name


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for found in _LOADED.finditer(page.read_text()):
            loaded = found[1] or found[0]
            is_load = found[1] is not None or re.search(
                r"rel=\"?(stylesheet|icon|preload|preconnect)", loaded
            )
            assert not (is_load and "//" in loaded), f"{page.name}: {loaded}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet.name


def test_the_python_reference_has_signatures_and_plain_prose(site: Path) -> None:
    pages = {name: (site / "api" / f"{name}.html").read_text() for name in ("models", "objectives", "stages")}
    for page, wanted in (
        ("models", ("load_pretrained", "embed", "preprocess")),
        ("objectives", ("dino.dino_loss", "ibot.ibot_loss", "koleo.koleo", "gram.gram_loss")),
        ("stages", ("base.Stage", "base.Stage.run", "task.Task", "task.Task.losses")),
    ):
        for name in wanted:
            assert re.search(rf'id="orchestrator\.[\w.]*{re.escape(name)}"', pages[page]), name
    for name, text in pages.items():
        assert not re.search(r":(?:class|func|data|meth|mod|attr):", text), f"{name}: a role of Sphinx"
        assert not re.search(r'id="orchestrator\.[\w.]*\._(?!_)', text), f"{name}: a private name"


def test_the_site_can_be_searched(site: Path) -> None:
    """From a folder too, where a browser reads no JSON: the index is a script."""
    assert (site / "search" / "search_index.js").is_file()
