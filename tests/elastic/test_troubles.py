"""What a worker reports as trouble reaches the user once."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orchestrator.elastic.controller import ElasticRun
from orchestrator.elastic.run_monitor import RunMonitor


def test_trouble_of_a_worker_is_a_warning_and_no_second_line(tmp_path: Path) -> None:
    emitted: list[dict[str, Any]] = []
    controller: Any = SimpleNamespace(monitor=RunMonitor("toy", 10, tmp_path / "account", emitted.append))
    event = {"kind": "trouble", "what": "a photo cannot be read and is replaced by another one"}
    group: Any = None
    ElasticRun.handle(controller, group, 0, event)
    assert emitted == [{"kind": "log", "level": logging.WARNING, "text": f"toy: {event['what']}"}]
