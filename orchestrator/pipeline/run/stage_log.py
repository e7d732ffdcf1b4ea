"""The log file of a stage: everything the package logs while it runs, over all attempts."""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from orchestrator.redact import HIDDEN, KeyBlocks, redacted

_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"


class _Formatter(logging.Formatter):
    """Lines without what may be a secret, in tracebacks too."""

    def __init__(self) -> None:
        super().__init__(_FORMAT)
        self._keys = KeyBlocks()

    def format(self, record: logging.LogRecord) -> str:
        if self._keys.hides(record.getMessage()):
            record = copy.copy(record)
            record.msg, record.args = HIDDEN, None
        return redacted(super().format(record))


class _File(logging.FileHandler):
    """The log file. A disk without room costs lines of it, not the stage, nor a traceback a line on the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """See :class:`logging.Handler`."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """See :class:`logging.Handler`. What is in its buffer may find no room."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def stage_log(path: Path, title: str) -> Iterator[logging.Logger]:
    """Append the records of logger `orchestrator` (INFO and up) to `path`, below a line with `title`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("orchestrator")
    handler = _File(path, encoding="utf-8")
    handler.setFormatter(_Formatter())
    handler.setLevel(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
        file.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n")
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
