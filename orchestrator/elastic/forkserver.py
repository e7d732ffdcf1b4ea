"""The fork server: it has everything imported, and forks a worker when asked.

Importing torch and DeepSpeed takes seconds, a fork takes milliseconds, and a forked worker is a clean slate: no
process group, no engine, no stuck collective of the attempt before. The fork server itself computes nothing, holds no
device, and imports only what forks cleanly, so forking it is safe. It ends with its slot, and its worker with it.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import select
import signal
import sys
import time

from orchestrator.elastic.channel import Channel
from orchestrator.training.device import assert_forkable


def main(fd: int, preload: list[str]) -> None:
    """Import, say so, then fork on demand until the slot is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    slot = Channel.of(fd)
    began = time.monotonic()
    _import(preload)
    # What is there now will never be garbage: without this the first collection in a worker copies every page.
    gc.collect()
    gc.freeze()
    slot.send({"kind": "warm", "seconds": time.monotonic() - began})
    _serve(slot)


def _import(preload: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    from orchestrator.elastic import worker

    worker.warm_up()
    for module in preload:
        importlib.import_module(module)


def _serve(slot: Channel) -> None:
    workers: dict[int, int] = {}  # pidfd → pid
    poller = select.poll()
    poller.register(slot.socket, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd in workers:
                poller.unregister(fd)
                os.close(fd)
                pid = workers.pop(fd)
                _, status = os.waitpid(pid, 0)
                slot.send({"kind": "exit", "pid": pid, "code": os.waitstatus_to_exitcode(status)})
                continue
            message = slot.receive()
            if message is None:
                for pid in workers.values():
                    os.kill(pid, signal.SIGKILL)
                return
            assert message.fd is not None
            pid = _fork(slot, message.fd, list(workers))
            os.close(message.fd)
            pidfd = os.pidfd_open(pid)
            workers[pidfd] = pid
            poller.register(pidfd, select.POLLIN)
            slot.send({"kind": "forked", "pid": pid})


def _fork(slot: Channel, fd: int, others: list[int]) -> int:
    assert_forkable()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        slot.socket.close()
        for other in others:
            os.close(other)
        from orchestrator.elastic import worker

        code = worker.main(Channel.of(fd))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: tearing down torch and its process groups takes longer than a restart may.
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
