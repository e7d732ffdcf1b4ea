"""Ctrl-C: once to stop cleanly, twice to abort. Also SIGTERM, which is how schedulers say the same.

Either way the exit code is 130. It says that the pipeline was stopped and can go on, whoever asked for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

from orchestrator.errors import ClusterLostError

ABORTED = 130
_GRACE_S = 2.0
_POLL_S = 0.2
# What a stage may take to end after its cluster was lost. A busy machine needs most of a minute: calls under way
# come back one after the other.
_ENDING_S = 120.0

Result = TypeVar("Result")


def nothing() -> None:
    """What is called where there is nothing to do."""


class Interrupt:
    """What may end a stage from outside: the user, or the end of the cluster under it.

    Attributes:
        stop: set by the first signal.
        watch: called several times a second while a stage runs that needs the cluster; raises ClusterLostError.
        on_stop: called by the first signal.
        on_abort: the best effort before the process ends at the second signal; gets two seconds.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.watch: Callable[[], None] = nothing
        self.on_stop: Callable[[], None] = nothing
        self.on_abort: Callable[[], None] = nothing

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Listen for signals; in a thread other than the main one there are none to listen for."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._received) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if not self.stop.is_set():
            self.stop.set()
            self.on_stop()
            return
        # In a thread: the signal may have come while this one holds a lock that the effort needs.
        effort = threading.Thread(target=self.on_abort, daemon=True)
        effort.start()
        effort.join(_GRACE_S)
        os._exit(ABORTED)


def in_thread(call: Callable[[], Result], watch: Callable[[], None] = nothing) -> Result:
    """Run `call` in another thread and wait.

    Signals reach Python only between bytecodes of the main thread, so it must not be the one that is deep in
    a native call; and libraries that take SIGINT for themselves do so only in the main thread.

    Args:
        call: what to run.
        watch: called all the while; where it raises ClusterLostError, that is what comes of it, once `call` has
            ended, since nothing may still work on what the next attempt will.
    """
    results: list[Result] = []
    errors: list[Exception] = []

    def target() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)
        except BaseException as error:
            # A library that calls sys.exit must not end the driver as if all were well.
            errors.append(RuntimeError(f"it ended itself: {error!r}"))

    thread = threading.Thread(target=target, name="stage", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        try:
            watch()
        except ClusterLostError as lost:
            thread.join(_ENDING_S)
            if thread.is_alive():
                raise RuntimeError(f"{lost}, and the stage did not end within {_ENDING_S:.0f} s") from lost
            if not results:
                raise
    if errors:
        raise errors[0]
    return results[0]
