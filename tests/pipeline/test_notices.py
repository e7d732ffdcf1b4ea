"""What is said beside a run: of a dead driver once, of a long sending in plain words."""

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.pipeline.lease import liveness
from orchestrator.pipeline.tracking import tracking_run


def test_a_dead_driver_with_several_places_is_named_once() -> None:
    said: list[str] = []
    watch: Any = SimpleNamespace(why=lambda who: "which has ended")
    contender = liveness.Contender(watch, liveness.Timing(), "pipeline 'toy'", said.append)
    for process, number in (("process 7", 1), ("process 7", 2), ("process 7", None), ("process 8", 3)):
        contender.removed(process, SimpleNamespace(number=number))  # type: ignore[arg-type]
    assert said == [f"taken over from process {number}, which has ended" for number in (7, 8)]
    assert contender.notes == said


def test_a_sending_that_takes_long_says_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(tracking_run, "where", lambda loaded: "http://mlflow")
    loaded: Any = SimpleNamespace(spec=SimpleNamespace(tracking=SimpleNamespace(uri="http://mlflow")))
    watch = tracking_run._DrainProgress(loaded, SimpleNamespace(), said.append, None)  # type: ignore[arg-type]
    watch._print(SimpleNamespace(records=19), 6.0)  # type: ignore[arg-type]
    assert said == [
        "Still sending after 6 s: 19 tracking records to http://mlflow. This ends when all are accepted, or when "
        f"none was for {tracking_run.PATIENCE_S:.0f} s."
    ]
