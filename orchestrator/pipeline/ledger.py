"""The durable record of one pipeline: events that are only ever added, and the state they add up to."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict, Field

from orchestrator.pipeline.key import KeyParts
from orchestrator.spec import Strict
from orchestrator.store.local import Store

StageStateName = Literal["pending", "running", "done", "failed", "stopped"]
Happening = Literal["opened", "running", "done", "failed", "stopped", "closed", "settled"]


class Event(Strict):
    """One thing that happened. `opened` and `closed` concern the pipeline, the others one stage.

    Attributes:
        time: seconds since 1970.
        event: what happened. `settled` says that a dead attempt's tracking run was closed.
        stage: the stage's name.
        parts: what decided the stage's key.
        reasons: why the stage ran.
        run_id: the tracking run of the stage or of the pipeline.
        seconds: how long the attempt took.
        summary: the stage's figures.
        error: why it failed, one line.
        reused: the artifact was already there.
        status: how the pipeline's run ended: FINISHED, FAILED or KILLED.
    """

    # JSON has no NaN and pydantic would write null, which is no float when read back.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    time: float
    event: Happening
    stage: str | None = None
    parts: KeyParts | None = None
    reasons: tuple[str, ...] = ()
    run_id: str | None = None
    seconds: float | None = None
    summary: dict[str, float] = Field(default_factory=dict)
    error: str | None = None
    reused: bool = False
    status: str | None = None


@dataclass
class StageState:
    """What the ledger says about one stage: its newest key and what became of it."""

    name: str
    state: StageStateName = "pending"
    parts: KeyParts | None = None
    attempts: int = 0
    reasons: tuple[str, ...] = ()
    run_id: str | None = None
    started: float | None = None
    seconds: float = 0.0
    summary: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    reused: bool = False

    @property
    def key(self) -> str | None:
        """The stage's newest key."""
        return self.parts.key if self.parts else None


@dataclass
class PipelineState:
    """The fold of a pipeline's events.

    Attributes:
        run_id: the tracking run of the newest execution.
        open: that execution has not ended (it runs, or died).
        status: how it ended.
        stages: by name.
        started: anything ever happened.
    """

    run_id: str | None = None
    open: bool = False
    status: str | None = None
    stages: dict[str, StageState] = field(default_factory=dict)
    started: bool = False

    def apply(self, event: Event) -> None:
        """Add one event."""
        self.started = True
        if event.stage is not None:
            _apply_to_stage(self.stages.setdefault(event.stage, StageState(event.stage)), event)
        elif event.event == "opened":
            self.run_id, self.open, self.status = event.run_id, True, None
        elif event.event == "closed":
            self.open, self.status = False, event.status


def _apply_to_stage(stage: StageState, event: Event) -> None:
    same_key = stage.parts is not None and event.parts is not None and stage.key == event.parts.key
    if event.event == "running":
        fresh = not same_key or stage.state == "done"
        stage.attempts = 1 if fresh else stage.attempts + 1
        stage.seconds = 0.0 if fresh else stage.seconds
        stage.state, stage.started, stage.reasons = "running", event.time, event.reasons
        stage.summary, stage.error, stage.reused = {}, None, False
    elif event.event == "settled":
        stage.state = "stopped" if stage.state == "running" else stage.state
        return
    elif event.event in ("done", "failed", "stopped"):
        if event.reused and not same_key:
            stage.attempts, stage.seconds = 0, 0.0
        stage.state = event.event
        stage.seconds += event.seconds or 0.0
        stage.summary, stage.error, stage.reused = dict(event.summary), event.error, event.reused
    stage.parts = event.parts or stage.parts
    stage.run_id = event.run_id if event.run_id or not same_key else stage.run_id


class Ledger:
    """Events of one pipeline in the store, `ledger/<pipeline>/<number>.json`.

    Only the driver that holds the pipeline's lock may append.
    """

    def __init__(self, store: Store, pipeline: str) -> None:
        self._store = store
        self._prefix = f"ledger/{pipeline}/"
        self.state = PipelineState()
        self._next = 0
        self.refresh()

    def refresh(self) -> PipelineState:
        """Read what other processes added."""
        for name, event in self._read():
            self._next = _number(name) + 1
            self.state.apply(event)
        return self.state

    def append(self, event: Happening, **fields: Any) -> None:
        """Write one event durably, then count it in."""
        written = Event(time=time.time(), event=event, **fields)
        name = f"{self._prefix}{self._next:08d}.json"
        self._store.put_bytes(name, written.model_dump_json(exclude_defaults=True, indent=1).encode())
        self._next += 1
        self.state.apply(written)

    def _read(self) -> Iterable[tuple[str, Event]]:
        for name in self._store.list(self._prefix):
            if name.endswith(".json") and _number(name) >= self._next:
                yield name, Event.model_validate_json(self._store.get_bytes(name))


def _number(name: str) -> int:
    return int(name.rpartition("/")[2].removesuffix(".json"))
