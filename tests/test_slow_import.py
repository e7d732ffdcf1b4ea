"""A module of a user's that takes long to import is named, whatever imports it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import installed, slow_import
from orchestrator.pipeline.check.pipeline_check import _import_trouble
from orchestrator.stages.common.config import _known_model
from orchestrator.stages.common.network_source import check_module

LINE = "still importing the module {} since "


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module whose import takes so long that the line is certain."""
    monkeypatch.setattr(slow_import, "TOLD_AFTER_S", 0.05)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plug_slow", raising=False)
    (tmp_path / "plug_slow").mkdir()
    (tmp_path / "plug_slow" / "__init__.py").write_text("import time\ntime.sleep(1.0)\nmade = dict\n")
    (tmp_path / "plug_slow" / "part.py").write_text("made = dict\n")
    return "plug_slow"


@pytest.mark.parametrize(
    ("module", "use"),
    [
        ("plug_slow", lambda: installed.find("metrics", "plug_slow:made")),
        ("plug_slow", lambda: _import_trouble("plug_slow:made", deep=True)),
        ("plug_slow.part", lambda: _import_trouble("plug_slow.part:made", deep=False)),
        ("plug_slow", lambda: check_module("plug_slow:made")),
    ],
    ids=["extension", "callback", "package of a callback", "teacher"],
)
def test_a_module_that_takes_long_is_named_once(
    slow: str, module: str, use: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        use()
        use()
    assert caplog.text.count(LINE.format(module)) == 1


def test_our_own_models_start_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    def timer(*_: object) -> None:
        raise AssertionError("a timer for nothing")

    monkeypatch.setattr(slow_import.threading, "Timer", timer)
    assert _known_model("vit_s") == "vit_s"


def test_the_module_of_a_model_is_named_by_the_model(
    slow: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from orchestrator.models import presets

    monkeypatch.setattr(presets, "_offers", lambda: {"plugged": ("plug_slow:made",)})
    with pytest.raises(ValueError, match="must be a ViTConfig"):
        _known_model("plugged")
    assert LINE.format("of the model plugged") in caplog.text


def test_a_module_that_is_quick_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert installed.find("metrics", "json:dumps") is not None
    assert "still importing" not in caplog.text
