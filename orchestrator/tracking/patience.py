"""Waiting for MLflow without standing still: a stop is heard meanwhile, and the user is told what is waited for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from orchestrator.errors import Stopped
from orchestrator.redact import redacted

logger = logging.getLogger("orchestrator")

Result = TypeVar("Result")

_POLL_S = 0.2
# Until the first line about it, and between those that follow.
_FIRST_S, _EVERY_S = 15.0, 60.0


def interruptibly(call: Callable[[], Result], uri: str, stop: threading.Event | None, what: str) -> Result:
    """What `call` returns or raises; it runs in a thread, since a request may take minutes.

    Args:
        call: asks MLflow. After a stop it goes on alone, so doing it again has to be safe.
        uri: of MLflow, for the message.
        stop: set when the user asked for a clean stop.
        what: is being done, for the message, such as `publishing vit-s`.

    Raises:
        Stopped: `stop` was set meanwhile.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, name="mlflow", daemon=True)
    thread.start()
    began = time.monotonic()
    at = time.strftime("%H:%M:%S")
    warn_at = began + _FIRST_S
    while True:
        thread.join(_POLL_S)
        if not thread.is_alive():
            break
        if stop is not None and stop.is_set():
            raise Stopped
        if time.monotonic() >= warn_at:
            warn_at += _EVERY_S
            logger.warning(
                "%s: MLflow at %s has not answered since %s; each request is given a minute, three times",
                what,
                redacted(uri),
                at,
            )
    if errors:
        raise errors[0]
    return results[0]
