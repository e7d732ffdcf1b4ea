"""The durable record of one pipeline: events that are only ever added, and the state they add up to."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError

from orchestrator.config.settings import Strict
from orchestrator.errors import UserError, first_line
from orchestrator.fsio import NotAFileError
from orchestrator.names import parts_of
from orchestrator.pipeline.keys.cache_key import FORMAT as KEY_FORMAT
from orchestrator.pipeline.keys.cache_key import KeyParts, short
from orchestrator.storage.store import Store

StageStateName = Literal["pending", "running", "done", "failed", "stopped"]
Happening = Literal["opened", "running", "done", "failed", "stopped", "closed", "settled"]
# As many digits as no run uses up: of a longer name the next one may be too long for a file.
_EVENT = re.compile(r"([0-9]{8,18})(?:-([0-9]{8,18}))?\.json")
# A read from an object store is a round trip; one at a time, a long ledger would take minutes.
_READERS = 16
FORMAT = 1
# Some 3,000 years: times and durations of this size can be added up and shown.
_LONGEST_S = 1e11
_log = logging.getLogger(__name__)
# Records that this process has said are set aside: a command reads a ledger more than once.
_warned: set[tuple[str, str]] = set()


class _StoredParts(KeyParts):
    """Parts of a key as a record has them. What a later version added counts for the key, as it does there."""

    model_config = ConfigDict(extra="allow", frozen=True)


def _stored_parts(value: Any) -> Any:
    """Checks what becomes part of a path; the parts of keys that were computed here are left as they are."""
    parts = value if isinstance(value, KeyParts) else _StoredParts.model_validate(value)
    if len(parts_of(parts.kind)) != 1:
        raise ValueError(f"{parts.kind!r} is not a stage kind")
    return parts


class _EventFormat(BaseModel):
    """As much of a record as any version can read."""

    format: int = 1


class UnreadableRecordError(ValueError):
    """A record that this version cannot use; says why, in a few words."""


class Event(Strict):
    """One thing that happened. `opened` and `closed` concern the pipeline, the others one stage.

    Fields of a later version are kept as they are.

    Attributes:
        format: of the record; one with a higher format is of a later version.
        time: seconds since 1970.
        event: what happened. `settled` says that a dead attempt's tracking run was closed.
        stage: the stage's name.
        parts: what decided the stage's key.
        key: the key of these parts; events of earlier versions have none.
        reasons: why the stage ran.
        run_id: the tracking run of the stage or of the pipeline.
        seconds: how long the attempt took.
        summary: the stage's figures.
        error: why it failed, one line.
        reused: the artifact was already there.
        status: how the pipeline's run ended: FINISHED, FAILED or KILLED.
        code: the hash of the code that the attempt runs with.
        anew: the attempt is to replace an artifact that is there.
    """

    # JSON has no NaN and pydantic would write null, which is not a float when read back.
    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="constants")

    format: int = FORMAT
    time: float = Field(ge=-_LONGEST_S, le=_LONGEST_S, allow_inf_nan=False)
    event: Happening
    stage: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9_\-]*$")
    parts: Annotated[SerializeAsAny[KeyParts], BeforeValidator(_stored_parts)] | None = None
    key: str | None = None
    reasons: tuple[str, ...] = ()
    run_id: str | None = Field(None, pattern=r"^[A-Za-z0-9_\-]+$")
    seconds: float | None = Field(None, ge=-_LONGEST_S, le=_LONGEST_S, allow_inf_nan=False)
    summary: dict[str, float] = Field(default_factory=dict)
    error: str | None = None
    reused: bool = False
    status: str | None = None
    code: str = ""
    anew: bool = False


@dataclass
class StageState:
    """What the ledger says about one stage: its newest key and what became of it.

    `made` is the newest key whose artifact was made, or was found, whatever became of later ones.
    """

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
    code: str = ""
    anew: bool = False
    made: KeyParts | None = None

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
        # A new tracking run is a new beginning, also of a key that failed before.
        fresh = not same_key or stage.state == "done" or event.run_id != stage.run_id
        stage.attempts = 1 if fresh else stage.attempts + 1
        stage.seconds = 0.0 if fresh else stage.seconds
        stage.state, stage.started, stage.reasons = "running", event.time, event.reasons
        stage.summary, stage.error, stage.reused = {}, None, False
        stage.code, stage.anew = event.code, event.anew
    elif event.event == "settled":
        stage.state = "stopped" if stage.state == "running" else stage.state
        return
    elif event.event in ("done", "failed", "stopped"):
        if event.reused and not same_key:
            stage.attempts, stage.seconds = 0, 0.0
        stage.state = event.event
        stage.seconds += event.seconds or 0.0
        stage.summary, stage.error, stage.reused = dict(event.summary), event.error, event.reused
        if event.event == "done":
            stage.anew, stage.made = False, event.parts or stage.parts
    stage.parts = event.parts or stage.parts
    stage.run_id = event.run_id if event.run_id or not same_key else stage.run_id


class Fence(Protocol):
    """What entitles a process to append: a :class:`~orchestrator.pipeline.lease.lease_manager.Lease`."""

    epoch: int

    def check(self) -> None:
        """Raises LeaseLostError if it entitles to nothing any more."""


class Ledger:
    """Events of one pipeline in the store, `ledger/<pipeline>/<number>-<epoch>.json`.

    The epoch is that of the writer's hold on the pipeline. What a writer still wrote after another with a higher
    epoch went on from the same events has no effect, and no two writers' events have the same name. Events of
    earlier versions have no epoch in their names: it is 0.

    An event that cannot be read, or of a later format, is set aside with one line that names it: it has no effect
    but that of its name. Nothing is done to it.

    Args:
        store: holds the events.
        pipeline: the pipeline's name.
        fence: the hold on the pipeline, for the driver that has it; others only read.
    """

    def __init__(self, store: Store, pipeline: str, fence: Fence | None = None) -> None:
        self._store = store
        self._prefix = f"ledger/{pipeline}/"
        self._fence = fence
        self._events: dict[_Name, Event | None] = {}
        # The highest number that was tried: what failed may be there all the same, and is never overwritten.
        self._tried = -1
        self.state = PipelineState()
        self.refresh()

    @property
    def epoch(self) -> int:
        """The highest epoch of an event."""
        return max((name.epoch for name in self._events), default=0)

    @property
    def unreadable(self) -> list[str]:
        """The objects in the store that are set aside. What they say of stages and artifacts is not known."""
        return [f"{self._prefix}{name}" for name, event in sorted(self._events.items()) if event is None]

    def refresh(self) -> PipelineState:
        """Read what other processes added."""
        listed = (_Name.parse(name) for name in self._store.list(self._prefix))
        new = [name for name in listed if name is not None and name not in self._events]
        with ThreadPoolExecutor(_READERS) as readers:
            self._events.update(zip(new, readers.map(self._read, new), strict=True))
        self.state = PipelineState()
        for event in _effective(self._events):
            self.state.apply(event)
        return self.state

    def append(self, event: Happening, **fields: Any) -> None:
        """Write one event durably, then count it in.

        Where the store fails, the event may or may not be on record; readers see it whole or not at all.

        Raises:
            LeaseLostError: another driver may have the pipeline by now; nothing was written.
            UserError: no number is left for the event.
        """
        assert self._fence is not None, "only the driver that holds the pipeline appends"
        self._fence.check()
        parts = fields.get("parts")
        written = Event(time=time.time(), event=event, key=parts.key if parts else None, **fields)
        self._tried = 1 + max(self._tried, *(name.number for name in self._events), -1)
        name = _Name(self._tried, self._fence.epoch)
        fields = {"format": written.format} | written.model_dump(mode="json", exclude_defaults=True)
        if not is_event(str(name)):
            raise UserError(
                "the ledger has a record with the highest number there can be, so no other can follow",
                where=f"{self._prefix}{max(self._events)} in store {self._store.uri}",
                hint="move that record elsewhere if it is not one of orchestrator's",
            )
        data = json.dumps(fields, indent=1).encode()
        self._store.put_bytes(f"{self._prefix}{name}", data)
        self._events[name] = written
        self.state.apply(written)

    def _read(self, name: _Name) -> Event | None:
        full = f"{self._prefix}{name}"
        try:
            return parse(self._store.get_bytes(full))
        except (UnreadableRecordError, NotAFileError) as error:
            if (self._store.uri, full) not in _warned:
                _warned.add((self._store.uri, full))
                _log.warning("%s in store %s is ignored: %s", full, self._store.uri, error)
            return None


def is_event(name: str) -> bool:
    """Whether an object below `ledger/` is an event."""
    return _Name.parse(name) is not None


def parse(data: bytes) -> Event:
    """The event that an object holds.

    Raises:
        UnreadableRecordError: it is damaged, or of a later version.
    """
    try:
        found = _EventFormat.model_validate_json(data).format
        if found > FORMAT:
            raise UnreadableRecordError(
                f"it has format {found}, and this version reads formats up to {FORMAT}"
            )
        event = Event.model_validate_json(data)
    except ValidationError as error:
        raise UnreadableRecordError(first_line(error)) from None
    parts, key = event.parts, event.key
    # How keys of another format are made is not known here.
    if parts is not None and parts.format == KEY_FORMAT and key not in (None, parts.key):
        raise UnreadableRecordError(f"its key {short(key or '')} does not fit its parts")
    return event


class _Name(NamedTuple):
    """The name of an event's object."""

    number: int
    epoch: int

    def __str__(self) -> str:
        return f"{self.number:08d}-{self.epoch:08d}.json" if self.epoch else f"{self.number:08d}.json"

    @classmethod
    def parse(cls, name: str) -> _Name | None:
        found = _EVENT.fullmatch(name.rpartition("/")[2])
        return cls(int(found[1]), int(found[2] or 0)) if found else None


def _effective(events: Mapping[_Name, Event | None]) -> Iterator[Event]:
    """Events in order, without those that a writer added after another had taken over."""
    epoch = 0
    for name in sorted(events, key=lambda name: (name.number, -name.epoch)):
        if name.epoch >= epoch:
            epoch = name.epoch
            event = events[name]
            if event is not None:
                yield event
