"""What a stage logs is shown as one line that commands no terminal."""

from __future__ import annotations

import io
import logging

from rich.console import Console

from orchestrator.pipeline.console import _Ticker, _ToConsole


def test_control_characters_of_a_log_line_are_escaped() -> None:
    output = io.StringIO()
    handler = _ToConsole(Console(file=output, width=200), _Ticker("curate"))
    handler.emit(
        logging.makeLogRecord({"levelno": logging.WARNING, "msg": "photo a\x1b]0;title\x07b\nsecond"})
    )
    assert output.getvalue() == "  ! photo a\\x1b]0;title\\x07b\n"
