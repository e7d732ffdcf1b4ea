"""Threads that decode share a bounded amount of memory."""

from __future__ import annotations

import threading
import time

from orchestrator.data.decoding_memory import SharedMemory


def test_threads_share_memory_and_what_is_too_large_goes_alone() -> None:
    memory = SharedMemory(100)
    running: list[int] = []
    most = 0
    alone = []
    lock = threading.Lock()

    def work(size: int) -> None:
        nonlocal most
        with memory.hold(size):
            with lock:
                running.append(size)
                most = max(most, sum(running))
                if size > 100:
                    alone.append(len(running) == 1)
            time.sleep(0.005)
            with lock:
                running.remove(size)

    threads = [
        threading.Thread(target=work, args=(size,)) for size in [30, 30, 60, 250, 10, 90, 30, 250, 40] * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert alone == [True] * 6
    assert most == 250
