"""One group of workers, from its start to its end, as the controller sees it: who is there, and why it ended."""

from __future__ import annotations

import logging
import signal
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from orchestrator.elastic.fleet import Fleet, Place
from orchestrator.elastic.job import Job

logger = logging.getLogger("orchestrator")

# After the first sign of a loss, how long others may take to say what they know; Ray may still call a seat alive
# whose machine has just gone, and a worker that only lost its peer is not the cause.
_SETTLE_S = 0.3
_ASK_S = 3.0

Event = dict[str, Any]


class Lost(Enum):
    """What a group's end has cost; it decides which budget pays."""

    NOTHING = "nothing"
    MACHINE = "a machine"
    PROCESS = "a process"
    TASK = "an attempt"


@dataclass(frozen=True)
class Ended:
    """Why a group ended.

    Attributes:
        lost: what it cost.
        cause: one line for the log.
        planned: all its work is in a checkpoint.
        error: what the task raised: type, message, traceback, mistake.
        silent: seats that do not answer and must go.
    """

    lost: Lost
    cause: str
    planned: bool = False
    error: Event | None = None
    silent: tuple[str, ...] = ()


@dataclass
class Group:
    """Workers of one attempt, by rank.

    Attributes:
        job: what they train.
        places: their seats; places[r] is worker r's.
        token: of the attempt; events of other attempts are not heard.
        yielding: it was asked to checkpoint and end; `reason` says why.
        stepped: its first step is done.
        restored: it has its weights.
        formed: when, monotonic.
    """

    job: Job
    places: list[Place]
    token: str
    yielding: bool = False
    reason: str = ""
    stepped: bool = False
    restored: bool = False
    formed: float = field(default_factory=time.monotonic)
    _ends: dict[int, Event] = field(default_factory=dict)
    _suspect_since: float | None = None

    def begin(self, pickled: bytes, mtbf_s: float) -> None:
        """Fork the workers."""
        elastic = self.job.elastic
        for rank, place in enumerate(self.places):
            place.token, place.inbox, place.silence = self.token, [], 0.0
            attempt = {
                "token": self.token,
                "rank": rank,
                "world": len(self.places),
                "mtbf_s": mtbf_s,
                "hang_s": elastic.hang_s,
                "proxied": self.job.seat_blocks is not None,
                "num_blocks": self.job.num_blocks,
            }
            place.actor.begin.remote(attempt, pickled, self.job.seat_blocks)

    def yield_(self, reason: str) -> None:
        """Ask the workers to checkpoint after the step they are at, and to end."""
        logger.info("%s yields: %s", self.job.name, reason)
        self.yielding, self.reason = True, reason
        self.tell(0, {"op": "yield"})

    def tell(self, rank: int, message: Event) -> None:
        """Tell one worker something."""
        self.places[rank].actor.tell.remote(self.token, message)

    def kill(self) -> None:
        """End all workers now; their seats stay."""
        for place in self.places:
            place.token = ""
            place.actor.end.remote(self.token)

    def news(self) -> list[Event]:
        """What workers said, less what only concerns the group itself."""
        news = []
        for rank, place in enumerate(self.places):
            inbox, place.inbox = place.inbox, []
            for event in inbox:
                match event["kind"]:
                    case "listening":
                        peers = {"op": "peers", "host": place.host, "port": event["port"]}
                        for other in range(1, len(self.places)):
                            self.tell(other, peers)
                    case "ended":
                        self._ends.setdefault(rank, event)
                    case "exit":
                        self._ends.setdefault(rank, {"how": "died", "code": event["code"]})
                    case _:
                        news.append(event)
        return news

    def verdict(self, fleet: Fleet, silence_s: float, hung_s: float | None) -> Ended | None:
        """Why the group has ended; None while it goes on, or while it is not clear yet why it does not."""
        gone = [place for place in self.places if fleet.get(place.name) is not place]
        if gone:
            noticed = " after its notice" if any(place.draining for place in gone) else ""
            nodes = sorted({place.node[:8] for place in gone})
            return Ended(
                Lost.MACHINE,
                f"lost {len(gone)} of {len(self.places)} workers: node {', '.join(nodes)} is gone{noticed}",
            )
        if silent := [place for place in self.places if place.silence > silence_s]:
            return self._stuck(silent, f"has not answered for {silent[0].silence:.0f} s", Lost.PROCESS)
        bad = {rank: end for rank, end in self._ends.items() if end["how"] in ("died", "error")}
        if bad:
            return self._settled(bad)
        if len(self._ends) == len(self.places):
            how = {end["how"] for end in self._ends.values()}
            return Ended(Lost.NOTHING, "done" if "done" in how else self.reason, planned=True)
        if hung_s is not None:
            return self._stuck(self.places, f"made no progress for {hung_s:.0f} s", Lost.PROCESS)
        return None

    def _settled(self, bad: dict[int, Event]) -> Ended | None:
        """Who was first: a machine, a process, or the task. Others only lost their peer."""
        if self._suspect_since is None:
            self._suspect_since = time.monotonic()
        waited = time.monotonic() - self._suspect_since
        silent = tuple(place.name for place in self.places if place.heard < self._suspect_since)
        if waited < _SETTLE_S or (silent and waited < _ASK_S):
            return None
        if silent:
            what = f"lost {len(silent)} of {len(self.places)} workers: their seats do not answer"
            return Ended(Lost.MACHINE, what, silent=silent)
        errors = [end for end in bad.values() if end["how"] == "error"]
        own = [end for end in errors if not end["broken"]]
        if own:
            return Ended(Lost.TASK, f"{own[0]['type']}: {own[0]['message']}", error=own[0])
        for rank, end in bad.items():
            if end["how"] == "died":
                return Ended(Lost.PROCESS, f"worker {rank} died ({_exit(end['code'])})")
        return Ended(Lost.PROCESS, f"workers lost each other: {errors[0]['message'].splitlines()[0]}")

    def _stuck(self, places: list[Place], what: str, lost: Lost) -> Ended:
        import ray

        stacks = {}
        for rank, place in enumerate(self.places):
            try:
                stacks[rank] = ray.get(place.actor.stacks.remote(), timeout=3.0)
            except ray.exceptions.RayError as error:
                stacks[rank] = f"its seat does not answer ({type(error).__name__})"
        for rank, text in stacks.items():
            logger.warning("%s: worker %d of %d:\n%s", self.job.name, rank, len(self.places), text)
        rank = self.places.index(places[0])
        stopped = [r for r, text in stacks.items() if "is stopped" in text]
        who = f"worker {stopped[0] if stopped else rank}"
        why = stacks[stopped[0]] if stopped else "the stacks are in the log"
        return Ended(lost, f"{who} {what}: {why}")


def _exit(code: object) -> str:
    if isinstance(code, int) and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}" if isinstance(code, int) else str(code)
