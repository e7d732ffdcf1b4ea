"""The log of a stage on a disk without room."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.pipeline.run.stage_log import stage_log

FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_log_without_room_prints_no_tracebacks(capfd: pytest.CaptureFixture[str]) -> None:
    with stage_log(FULL, "title") as logger:
        for number in range(20):
            logger.info("line %d", number)
    assert capfd.readouterr().err == ""
