"""A client of a named Ray actor that may die at any time and comes back under its name, on whatever machine."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

logger = logging.getLogger("orchestrator")

NAMESPACE = "orchestrator"

_ANSWER_S = 10.0
_FIRST_DELAY_S, _LAST_DELAY_S = 0.1, 2.0
_SLICE_S = 0.5


class ClosedError(RuntimeError):
    """Nobody wants the answer any more."""


class ActorClient:
    """Calls of an actor's methods that survive the actor. Thread-safe.

    Args:
        name: of the actor.
        patience_s: how long it may be away.
    """

    def __init__(self, name: str, patience_s: float) -> None:
        self.name = name
        self._patience_s = patience_s
        self._actor: Any = None
        self.closed = threading.Event()

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns, from this actor or one that came in its place.

        Raises:
            RuntimeError: it was away for too long.
            ClosedError: this client was closed.
        """
        import ray

        heard, delay = time.monotonic(), _FIRST_DELAY_S
        while True:
            try:
                return self.get(getattr(self._find(), method).remote(*arguments), _ANSWER_S)
            except (ray.exceptions.RayError, LookupError) as error:
                self._bear(error, time.monotonic() - heard)
            self.closed.wait(delay)
            delay = min(_LAST_DELAY_S, 2 * delay)

    def get(self, ref: Any, limit_s: float) -> Any:
        """The value of a reference, looking now and then whether anybody still wants it.

        Raises:
            RayError: of the object, or GetTimeoutError after `limit_s`.
            ClosedError: this client was closed.
        """
        import ray

        until = time.monotonic() + limit_s
        while True:
            if self.closed.is_set():
                raise ClosedError(f"the connection to {self.name} is closed")
            ready, _ = ray.wait([ref], timeout=_SLICE_S)
            if ready or time.monotonic() > until:
                return ray.get(ref, timeout=limit_s if ready else 0)

    def _bear(self, error: Exception, away_s: float) -> None:
        lines = str(error).strip().splitlines() or [""]
        what = f"{type(error).__name__}: {lines[0]}"
        if away_s > self._patience_s:
            raise RuntimeError(
                f"the teacher service has not been reachable for {away_s:.0f} s: {what}"
            ) from error
        logger.info(
            "the teacher service has not been reachable for %.0f s (%s): retrying, for %.0f s in all",
            away_s,
            what,
            self._patience_s,
        )
        self._actor = None

    def _find(self) -> Any:
        import ray

        actor = self._actor
        if actor is None:
            try:
                actor = self._actor = ray.get_actor(self.name, NAMESPACE)
            except ValueError as error:
                raise LookupError("it has no actor now") from error
        return actor
