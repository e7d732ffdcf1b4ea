"""A user's module that takes long to import, or never ends: one line says which, and since when."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

# Longer than torch takes on a busy machine once its files are in memory.
TOLD_AFTER_S = 5.0
_log = logging.getLogger("orchestrator")


@contextlib.contextmanager
def warn_if_slow(what: str) -> Iterator[None]:
    """Around an import: after some seconds one line names the module. One that holds the GIL all the while is not told.

    Args:
        what: the module's name, or whose it is, such as `of the model vit_thin`; a module that has been imported
            already costs nothing.
    """
    # One that hangs halfway is among them too, until it fails.
    spec = getattr(sys.modules.get(what), "__spec__", None)
    if what in sys.modules and not getattr(spec, "_initializing", False):
        yield
        return
    since = time.strftime("%H:%M:%S")

    def warn() -> None:
        _log.warning(
            "still importing the module %s since %s: the command goes on once its import ends; Ctrl-C stops it",
            what,
            since,
        )

    timer = threading.Timer(TOLD_AFTER_S, warn)
    # An import that ends the process must not wait for the line.
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
