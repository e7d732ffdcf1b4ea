"""Connecting this process to a Ray cluster and leaving it, with its signals and its other threads unharmed."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from orchestrator.errors import Stopped

logger = logging.getLogger("orchestrator")

_CALLS_S, _STILL_S = 5.0, 0.2
# Shorter than `_STILL_S`: whoever waits so is out of Ray before the process leaves the cluster.
SLICE_S = 0.1
_RAYS_THREADS = ("listener_thread", "logger_thread")
_WAITING = ("get_objects", "wait")  # the innermost Python frame of `ray.get` and `ray.wait`


def connect(**options: Any) -> Any:
    """`ray.init`, silent, and with the signal handlers of this process as they were.

    Raises:
        Stopped: SIGTERM came meanwhile.
    """
    import ray
    from ray._private import auto_init_hook

    # What a stage's thread still asks of a cluster that is gone must not start another one.
    auto_init_hook.enable_auto_connect = False
    handlers = _handlers()
    context = None
    try:
        with _sigterm_noted() as noted:
            context = ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except BaseException:
        if not noted:
            raise
    finally:
        _restore(handlers)
    if noted:
        disconnect()
        signal.raise_signal(signal.SIGTERM)
        raise Stopped
    _quiet()
    return context


@contextlib.contextmanager
def _sigterm_noted() -> Iterator[list[int]]:
    """SIGTERM ends what runs here and is listed.

    Ray's own handlers raise SystemExit, and Python drops an exception that is raised in a callback, as of a fork
    or of the garbage collector: a SIGTERM at that moment would be lost.
    """
    noted: list[int] = []

    def note(number: int, frame: object) -> NoReturn:
        noted.append(number)
        raise SystemExit(number)

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    from ray._private import utils

    set_by_ray, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    signal.signal(signal.SIGTERM, note)
    try:
        yield noted
    finally:
        utils.set_sigterm_handler = set_by_ray


def disconnect() -> None:
    """`ray.shutdown`, which sets SIGTERM to its default below Python, and the handlers of before again.

    Ray ends the whole process where a thread still asks a core worker that is shut down, even if all it does is drop
    a reference to an object. So new calls get Ray's own error, those that are under way have some time to end, and
    then nobody finds the core worker any more.
    """
    import ray
    from ray._private import worker

    handlers = _handlers()
    connected = worker.global_worker
    connected.check_connected = _refuse
    try:
        _wait_for_calls(connected)
        if core_worker := getattr(connected, "core_worker", None):
            connected.core_worker = _Leaving(core_worker)
        ray.shutdown()
    finally:
        del connected.check_connected
        _restore(handlers)


def answer_of(reference: Any, timeout_s: float) -> Any:
    """`ray.get`, in short waits.

    A thread that is in a long one while another leaves the cluster does not always come out of it again, not even
    when its time is up. After a short one it is refused, see :func:`disconnect`.

    Raises:
        RayError: of the object; GetTimeoutError after `timeout_s`; or the cluster is being left.
    """
    import ray

    until = time.monotonic() + timeout_s
    while True:
        left = until - time.monotonic()
        ready, _ = ray.wait([reference], timeout=max(0.0, min(SLICE_S, left)))
        if ready:
            return ray.get(reference)
        if left <= 0:
            raise ray.exceptions.GetTimeoutError(f"no answer within {timeout_s:g} s")


class _Leaving:
    """A core worker that has nothing any more from when its shutdown begins."""

    def __init__(self, core_worker: Any) -> None:
        self._core_worker = core_worker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core_worker, name)

    def shutdown_driver(self) -> None:
        core_worker, self._core_worker = self._core_worker, None
        core_worker.shutdown_driver()


def _refuse() -> NoReturn:
    from ray.exceptions import RaySystemError

    raise RaySystemError("the cluster of this run is being left")


def _wait_for_calls(connected: Any) -> None:
    """Until other threads are in no call of Ray's but in one that waits for an answer, which the shutdown ends."""
    import ray

    threads = [threading.current_thread(), *(getattr(connected, name, None) for name in _RAYS_THREADS)]
    own = {thread.ident for thread in threads if thread is not None}
    folder = str(Path(ray.__file__).parent)
    deadline = time.monotonic() + _CALLS_S
    before = None
    while time.monotonic() < deadline:
        stacks = {ident: frame for ident, frame in sys._current_frames().items() if ident not in own}
        inside = {ident: frame for ident, frame in stacks.items() if _is_below(frame, folder)}
        waiting = {ident: (id(frame), frame.f_lasti) for ident, frame in inside.items()}
        are_still = waiting == before and all(frame.f_code.co_name in _WAITING for frame in inside.values())
        if are_still or not inside:
            return
        before = waiting
        time.sleep(_STILL_S)


def _is_below(frame: FrameType | None, folder: str) -> bool:
    """Whether code of this folder is on the stack."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(folder):
            return True
        frame = frame.f_back
    return False


def _handlers() -> dict[signal.Signals, Any]:
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            # None: one that was not set from Python, and cannot be set again from it.
            if handler is not None:
                signal.signal(number, handler)


def _quiet() -> None:
    """The raylet's notices go to the log; Ray would print them between our lines even without `log_to_driver`."""
    from ray._private import worker

    def to_log(data: dict[str, Any], *_: Any, **__: Any) -> None:
        for line in data["lines"]:
            logger.debug("%s: %s", data["pid"], line)

    worker.print_to_stdstream = to_log
