"""Blocks loaded behind the training's back: several threads, several steps ahead, and as many as training needs.

A block is a function of its step and index, so the bytes are the same for any number of threads. Decoding and cropping
run outside of Python's lock, so threads of one process are enough for a device; OpenCV starts none of its own.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from orchestrator.data.blocks import Block, BlockSource

# A step may wait for its blocks so long, as a share of its time, before another thread helps to load.
_WAIT = 0.01
# Steps in a row that wait before one does: the first ones wait for everything there is.
_PATIENCE = 2


class BlockLoader:
    """Loads a worker's blocks of each step ahead of the steps.

    Memory is bounded: no block is begun that is more than `ahead` steps after the one that is used.

    Args:
        source: of the blocks. One that does not say that it is `parallel` is asked by one thread, a step ahead.
        indices: this worker's blocks of each step; there may be none.
        first: threads that load from the beginning.
        most: threads at most, at least `first`. One more loads where steps wait for their blocks.
        ahead: steps that are loaded while one is used, at least 1.

    Attributes:
        waited_s: seconds that the training waited for the blocks of the latest step.
    """

    def __init__(
        self, source: BlockSource, indices: Sequence[int], first: int, most: int, ahead: int
    ) -> None:
        import cv2

        # What a view is cut with would otherwise take all processors for each of many small pictures.
        cv2.setNumThreads(1)
        parallel = getattr(source, "parallel", False)
        self._source, self._indices = source, tuple(indices)
        self._ahead, self._most = (ahead, most) if parallel else (1, 1)
        self._active = first if parallel else 1
        self._may = threading.Semaphore(self._active)
        self.waited_s = 0.0

    @property
    def num_loaders(self) -> int:
        """Threads that load now."""
        return self._active

    def steps(self, start: int, stop: int) -> Generator[tuple[int, list[Block]], None, None]:
        """Each step's own blocks, in the order of `indices`.

        Raises:
            Exception: what loading one of the blocks raised, when it is the turn of its step.
        """
        waiting: deque[tuple[int, list[Future[Block]]]] = deque()
        upcoming = iter(range(start, stop))
        pool = ThreadPoolExecutor(self._most, thread_name_prefix="blocks")
        slow, used = 0, time.monotonic()
        try:
            while True:
                while len(waiting) <= self._ahead and (step := next(upcoming, None)) is not None:
                    waiting.append((step, [pool.submit(self._load, step, index) for index in self._indices]))
                if not waiting:
                    return
                step, blocks = waiting.popleft()
                asked = time.monotonic()
                loaded = [block.result() for block in blocks]
                now = time.monotonic()
                self.waited_s = now - asked
                slow = slow + 1 if self.waited_s > _WAIT * (now - used) else 0
                used = now
                if slow > _PATIENCE and self._active < self._most:
                    self._active, slow = self._active + 1, 0
                    self._may.release()
                yield step, loaded
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, step: int, index: int) -> Block:
        with self._may:
            return self._source.load(step, index)
