"""A seat: the Ray actor that holds one worker's place on a node and stays while workers come and go.

It imports no torch. Its zygote (`zygote.py`) is warm before it is needed, forks a fresh worker for every attempt,
and lives from stage to stage. The controller talks to the worker through the seat.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.elastic.wire import Message, Wire, pack

logger = logging.getLogger("orchestrator")

Event = dict[str, Any]
_END_S = 10.0


class Seat:
    """Holds one place. Methods block, so it runs with `max_concurrency` threads.

    Args:
        env: environment of the zygote and its workers, over this process's own.
        preload: modules that the zygote imports beside torch and DeepSpeed.
    """

    def __init__(self, env: dict[str, str], preload: tuple[str, ...]) -> None:
        with suppress(ValueError):  # only a main thread may
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        ours, theirs = Wire.pair()
        fd = theirs.socket.fileno()
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.elastic.zygote", str(fd), *preload],
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            env={**os.environ, **env},
        )
        theirs.close_here()
        self._wire = ours
        self._changed = threading.Condition()
        self._warm: float | None = None
        self._dead = False
        self._events: list[Event] = []
        self._worker: Wire | None = None
        self._pid: int | None = None
        self._ended = False
        self._token = ""
        self._starting = threading.Lock()
        self._heard = time.monotonic()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="blocks")
        threading.Thread(target=self._listen_to_zygote, daemon=True).start()

    # --- what the controller asks -----------------------------------------------------------------------------

    def where(self) -> dict[str, str]:
        """The node this seat is on."""
        import ray

        return {
            "node": ray.get_runtime_context().get_node_id(),
            "host": ray.util.get_node_ip_address(),
            "pid": str(os.getpid()),
        }

    def warm(self) -> float:
        """Wait until a worker can be forked; the seconds that the imports took.

        Raises:
            RuntimeError: the zygote died.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._warm is not None or self._dead)
            if self._warm is None:
                raise RuntimeError(f"the zygote ended with {self._zygote.poll()} while it was importing")
            return self._warm

    def begin(self, attempt: dict[str, Any], job: bytes, blocks: Callable[[], Any] | None) -> None:
        """Fork a worker for `attempt`, after the end of the one before, if there is one.

        Args:
            attempt: rank, world, token and the like; goes to the worker as it is.
            job: the pickled job, made by the driver; opaque here.
            blocks: makes a block source that has to live in a Ray process; the worker asks this seat for blocks.
                It has a `close`, after which no `load` waits any more.
        """
        with self._starting:
            self.end(self._token)
            ours, theirs = Wire.pair()
            with self._changed:
                self._events, self._pid, self._ended, self._token = [], None, False, attempt["token"]
                self._heard = time.monotonic()
                self._worker = ours
                self._changed.notify_all()
            try:
                source = blocks() if blocks is not None else None
            except Exception as error:
                self._say(_described(error))
                return
            self._wire.send({}, fd=theirs.socket.fileno())
            theirs.close_here()
            arguments = (ours, attempt["token"], source)
            threading.Thread(target=self._listen_to_worker, args=arguments, daemon=True).start()
            with suppress(OSError):  # it may have died at once, which the zygote tells
                ours.send({"op": "begin", **attempt}, job)

    def tell(self, token: str, message: dict[str, Any]) -> None:
        """Pass a message on to the worker of attempt `token`, once it is there; one that has ended hears nothing."""
        with self._changed:
            # Ray runs calls side by side: this one may be faster than `begin`.
            self._changed.wait_for(lambda: self._token == token, _END_S)
            worker = self._worker if self._token == token else None
        if worker is not None:
            with suppress(OSError):
                worker.send(message)

    def end(self, token: str) -> None:
        """Kill the worker of attempt `token`, if there still is one, and wait until it is gone."""
        with self._changed:
            if token != self._token or self._worker is None:
                return
            worker, self._worker = self._worker, None
            self._changed.wait_for(lambda: self._pid is not None or self._dead or self._ended, _END_S)
            if self._pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
                self._changed.wait_for(lambda: self._pid is None or self._dead, _END_S)
        worker.close()

    def events(self, timeout: float) -> dict[str, Any]:
        """What the worker said since the last call; waits at most `timeout` seconds for something.

        Returns:
            `events`, `token` (of the attempt they belong to) and `silence`: seconds since anything was heard from
            a living worker, which beats once a second.
        """
        with self._changed:
            self._changed.wait_for(lambda: bool(self._events), timeout)
            events, self._events = self._events, []
            silence = time.monotonic() - self._heard if self._pid is not None else 0.0
            return {"events": events, "token": self._token, "silence": silence}

    def stacks(self) -> str:
        """What the worker is doing: its threads' stacks, or why it cannot tell."""
        pid = self._pid
        if pid is None:
            return "there is no worker process"
        with suppress(OSError):
            state = _state(pid)
            if state.startswith(("T", "t")):
                return f"process {pid} is stopped (state {state})"
            return _dumped_stacks(pid)
        return f"process {pid} is gone"

    def _say(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    # --- what it hears ----------------------------------------------------------------------------------------

    def _listen_to_zygote(self) -> None:
        while (message := self._wire.receive()) is not None:
            body = message.body
            with self._changed:
                if body["kind"] == "warm":
                    self._warm = body["seconds"]
                elif body["kind"] == "forked":
                    self._pid = body["pid"]
                elif body["kind"] == "exit" and body["pid"] == self._pid:
                    self._pid, self._ended = None, True
                    self._events.append({"kind": "exit", "code": body["code"]})
                self._changed.notify_all()
        self._zygote.wait()
        with self._changed:
            self._dead = True
            self._events.append({"kind": "exit", "code": "the zygote died"})
            self._changed.notify_all()
        # Without its zygote the seat is of no use; a new one is made in its place.
        os._exit(1)

    def _listen_to_worker(self, wire: Wire, token: str, source: Any) -> None:
        while (message := wire.receive()) is not None:
            with self._changed:
                if token != self._token:
                    break
                self._heard = time.monotonic()
                if message.body["kind"] not in ("beat", "load"):
                    self._events.append(message.body)
                    self._changed.notify_all()
            if message.body["kind"] == "load":
                self._pool.submit(self._load, source, wire, message)
        if source is not None:
            # What still waits for a block of this attempt would keep the next one waiting.
            source.close()

    def _load(self, source: Any, wire: Wire, message: Message) -> None:
        request = message.body
        try:
            block = source.load(request["step"], request["index"])
            fd, layout = pack({"ids": block.ids, **block.arrays})
        except Exception as error:
            answer = {"op": "block", "error": f"{type(error).__name__}: {error}"}
            with suppress(OSError):
                wire.send({**answer, "step": request["step"], "index": request["index"]})
            return
        try:
            with suppress(OSError):
                where = {"step": block.step, "index": block.index}
                wire.send({"op": "block", **where, "layout": layout}, fd=fd)
        finally:
            os.close(fd)


def _described(error: Exception) -> Event:
    text = "".join(traceback.format_exception(error))
    name, message = type(error).__name__, str(error)
    return {
        "kind": "ended",
        "how": "error",
        "type": name,
        "message": message,
        "traceback": text,
        "broken": False,
    }


def _state(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line for line in status.splitlines() if line.startswith("State:")).split(None, 1)[1]


def _dumped_stacks(pid: int) -> str:
    """The worker keeps a memory file for this, which lives and dies with it."""
    found = [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if "memfd:stacks" in str(fd.readlink())]
    if not found:
        return f"process {pid} has not started its work yet (state {_state(pid)})"
    before = len(found[0].read_text())
    os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline and len(found[0].read_text()) == before:
        time.sleep(0.05)
    return found[0].read_text()[before:] or f"process {pid} does not answer (state {_state(pid)})"
