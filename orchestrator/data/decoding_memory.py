"""Memory that threads share while they decode pictures."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

# What threads share: a quarter of the machine's memory, within bounds.
SHARED_BYTES = min(max(512 << 20, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4), 16 << 30)


class SharedMemory:
    """Bytes that threads of this process share, first come first served. What is more than all of them goes alone."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._used = capacity, 0
        self._changed, self._turn = threading.Condition(), threading.Lock()

    @contextlib.contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Have `num_bytes` for the `with` block; waits for them. Not to be nested in a thread."""
        # The first in line keeps its turn, so that small pictures do not overtake a large one for ever.
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + num_bytes <= self._capacity)
            self._used += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= num_bytes
                self._changed.notify_all()
