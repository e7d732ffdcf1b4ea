"""Blocks loaded behind the training's back: several at once, several steps ahead, and as many as training needs.

A block is a function of its step and index, so the bytes are the same for any number of loaders and whether they are
threads or processes. Decoding and cropping run outside of Python's lock for most of their time, so threads are enough
for a few loaders; OpenCV starts none of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from orchestrator.data.blocks import Block, BlockSource
from orchestrator.training.loader_process import ProcessBlocks

T = TypeVar("T")

logger = logging.getLogger("orchestrator")

# A step may wait for its blocks so long, as a share of its time, before another loader helps.
_WAIT = 0.01
# Steps in a row that wait before one does: the first ones wait for everything there is.
_PATIENCE = 2
# Steps in which threads, and then processes, show how fast they load; and how much more processes have to.
_MEASURED = 6
_GAIN = 1.1


class BlockLoader(Generic[T]):
    """Loads a worker's blocks of each step ahead of the steps.

    Memory is bounded: no block is begun that is more than `ahead` steps after the one that is used.

    Args:
        source: of the blocks. One that does not say that it is `parallel` is asked by one thread, a step ahead.
        indices: this worker's blocks of each step; there may be none.
        first: loaders from the beginning.
        most: loaders at most, at least `first`. One more loads where steps wait for their blocks.
        ahead: steps that are loaded while one is used, at least 1.
        finish: makes of each block what steps get, in the thread that loaded it.
        processes: another source of the same blocks, loaded in processes. It is tried where steps wait although
            `most` threads load, and kept if it loads more. Who made it closes it.

    Attributes:
        waited_s: seconds that the training waited for the blocks of the latest step.
    """

    def __init__(
        self,
        source: BlockSource,
        indices: Sequence[int],
        first: int,
        most: int,
        ahead: int,
        finish: Callable[[Block], T],
        *,
        processes: ProcessBlocks | None = None,
    ) -> None:
        import cv2

        # What a view is cut with would otherwise take all processors for each of many small pictures.
        cv2.setNumThreads(1)
        parallel = getattr(source, "parallel", False)
        self._source, self._indices, self._finish = source, tuple(indices), finish
        self._ahead, self._most = (ahead, most) if parallel else (1, 1)
        self._active = first if parallel else 1
        self._may = threading.Semaphore(self._active)
        self._trial = _Trial(source, processes, self._ahead) if parallel and processes is not None else None
        self.waited_s = 0.0

    @property
    def num_loaders(self) -> int:
        """Threads or processes that load now."""
        return self._active

    @property
    def source(self) -> BlockSource:
        """What blocks are asked for now."""
        return self._source if self._trial is None else self._trial.source

    def steps(self, start: int, stop: int) -> Generator[tuple[int, list[T]], None, None]:
        """Each step's own blocks, in the order of `indices`.

        Raises:
            Exception: what loading one of the blocks raised, when it is the turn of its step.
        """
        waiting: deque[tuple[int, list[Future[T]]]] = deque()
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
                elif slow > _PATIENCE and self._trial is not None:
                    self._trial.step_waited(step, now, self._active)
                yield step, loaded
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if self._trial is not None:
                self._trial.wait()

    def _load(self, step: int, index: int) -> T:
        with self._may:
            return self._finish(self.source.load(step, index))


class _Trial:
    """Whether processes load more than threads do: each for some steps that wait for what is loaded.

    While the processes start, threads go on.
    """

    def __init__(self, threads: BlockSource, processes: ProcessBlocks, ahead: int) -> None:
        self.source: BlockSource = threads
        self._threads, self._processes, self._ahead = threads, processes, ahead
        self._starting: threading.Thread | None = None
        self._ready = threading.Event()
        self._times: list[tuple[int, float]] = []
        self._step_s: float | None = None
        self._decided = False

    def step_waited(self, step: int, now: float, num_loaders: int) -> None:
        """`step` waited for its blocks until `now`, although all loaders load."""
        if self._decided:
            return
        if self._source_is_threads() and self._starting is not None:
            if self._ready.is_set():
                self.source, self._times = self._processes, []
            return
        self._times.append((step, now))
        # The first steps after a change were loaded by those before it.
        if len(self._times) <= self._ahead + 1 + _MEASURED:
            return
        (first, began), (last, ended) = self._times[-1 - _MEASURED], self._times[-1]
        measured = (ended - began) / (last - first)
        if self._source_is_threads():
            self._step_s = measured
            self._starting = threading.Thread(target=self._start, args=(num_loaders,), daemon=True)
            self._starting.start()
            return
        self._decided = True
        assert self._step_s is not None
        if measured * _GAIN > self._step_s:
            self.source = self._threads
            # They take memory; ending them takes a moment.
            self._starting = threading.Thread(target=self._processes.retire, daemon=True)
            self._starting.start()
        chosen = "threads" if self._source_is_threads() else "processes"
        logger.info(
            "photos are loaded by %s: a step takes %.3g s with %d threads and %.3g s with as many processes",
            chosen,
            self._step_s,
            num_loaders,
            measured,
        )

    def wait(self) -> None:
        """Wait until nothing is being started or ended any more."""
        if self._starting is not None:
            self._starting.join()

    def _source_is_threads(self) -> bool:
        return self.source is self._threads

    def _start(self, count: int) -> None:
        try:
            self._processes.start(count)
        except Exception as error:
            logger.warning("photos are loaded by threads: processes cannot be started: %s", error)
            self._decided = True
            # Those that did start would wait in memory until the training ends.
            self._processes.close()
        else:
            self._ready.set()
