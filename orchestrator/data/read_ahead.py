"""What threads make of items, in the order of the items, with a bound on what waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(call: Callable[[T], R], items: Iterable[T], loaders: int, ahead: int) -> Iterator[R]:
    """What `call` makes of each item, in order, by several threads.

    Args:
        call: must release the interpreter lock, as decoders do, for threads to help.
        items: are taken as they are needed.
        loaders: the number of threads.
        ahead: the most results that wait for the caller, who may be busy with a model meanwhile.
    """
    pool = ThreadPoolExecutor(loaders, thread_name_prefix="loader")
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Of what nobody takes any more, whatever ended this, nothing is waited for.
        pool.shutdown(wait=False, cancel_futures=True)
