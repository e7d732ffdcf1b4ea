"""Ray Train's logs in processes that serve more than one run.

Ray Train configures logging anew for each controller and each worker, since its own have a process each. With others
at work in the same process this can stop for ever: `dictConfig` holds logging's lock while it waits for the lock of
each handler, and a handler that writes its first record holds its own lock while it waits for logging's. So log files
are opened at once, and of several controllers the first one configures, under a lock; those that follow write to the
same files, under the names of their own runs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

from ray.train.v2._internal.logging import LoggingManager
from ray.train.v2._internal.logging.logging import SessionFileHandler, TrainContextFilter

_run_name: ContextVar[str | None] = ContextVar("run_name", default=None)


@contextmanager
def logs_of_run(name: str) -> Iterator[None]:
    """What this thread logs meanwhile is of run `name`."""
    token = _run_name.set(name)
    try:
        yield
    finally:
        _run_name.reset(token)


class _NameOfRun(logging.Filter):
    """Ray Train's own filter knows the run of the controller that configured; this one knows the thread's."""

    def filter(self, record: logging.LogRecord) -> bool:
        if (name := _run_name.get()) is not None:
            setattr(record, TrainContextFilter.LogKey.RUN_NAME, name)
        return True


class ControllerLogging:
    """In the place of Ray Train's `LoggingManager`, for controllers."""

    _lock = threading.Lock()
    _configured: ClassVar[bool] = False

    @classmethod
    def configure_controller_logger(cls, context: Any) -> None:
        """Configure the logger `ray.train` of this process, once."""
        with cls._lock:
            if cls._configured:
                return
            LoggingManager.configure_controller_logger(context)
            open_log_files()
            for handler in logging.getLogger("ray.train").handlers:
                handler.addFilter(_NameOfRun())
            cls._configured = True


def open_log_files() -> None:
    """Open the files that Ray Train's handlers would open with their first record, which waits for logging's lock."""
    for name in ("ray.train", ""):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, SessionFileHandler):
                handler.acquire()
                try:
                    handler.get_log_file_path()
                finally:
                    handler.release()
