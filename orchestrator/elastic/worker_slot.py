"""Ray Train's workers: a warm slot that forks a process for each attempt, or a cold one, Ray Train's own way.

A :class:`WorkerSlot` is a Ray actor that holds one worker's resources and stays while attempts come and go. It imports
no torch. Its fork server (`forkserver.py`) is warm before it is needed, forks a fresh process for every attempt, and
lives from stage to stage. Ray Train's controller sees a worker of its own kind: it sets the train context, starts
the train function, polls, and gets the errors of the forked process as the train function's.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from abc import abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

from orchestrator.elastic.channel import Channel, Message, pack
from orchestrator.elastic.train_logging import open_log_files
from orchestrator.errors import UserError
from orchestrator.training.device import assigned_gpus, environment

Event = dict[str, Any]
# A call that wants an answer of a process that starts or ends waits for it at most so long.
_ANSWER_S = 10.0


@dataclass
class SlotStatus(WorkerStatus):  # type: ignore[misc]  # Ray carries no types
    """What Ray Train's poll of a worker brings: its own fields, and ours.

    Attributes:
        token: of the attempt that the events belong to.
        events: what the worker reported since the last poll, in order.
        since_heartbeat_s: seconds since a living process was last heard of; it sends a heartbeat every second.
        end: how the process ended, if it did: `how` is `done`, `stopped`, `error` or `died`.
    """

    token: str = ""
    events: list[Event] = field(default_factory=list)
    since_heartbeat_s: float = 0.0
    end: Event | None = None


class WorkerError(RuntimeError):
    """A worker's process failed. `end` says how: see :class:`SlotStatus`."""

    def __init__(self, end: Event) -> None:
        self.end = end
        what = {
            "error": "{type}: {message}",
            "died": "the process died (exit code {code})",
            "silent": "no heartbeat for {seconds:.0f} s",
            "stalled": "no progress for {seconds:.0f} s",
        }[end["how"]]
        super().__init__(what.format(**end))

    def __reduce__(self) -> tuple[type[WorkerError], tuple[Event]]:
        return (WorkerError, (self.end,))


class Worker(RayTrainWorker):  # type: ignore[misc]
    """What both kinds of worker share: the events of an attempt, and a train function that ends as the attempt does."""

    def __init__(self) -> None:
        global _current
        super().__init__()
        _current = self
        self._changed = threading.Condition()
        self._token = ""
        self._begun = False
        self._events: list[Event] = []
        self._end: Event | None = None
        self._port: int | None = None
        self._heard = time.monotonic()

    @abstractmethod
    def begin(self, attempt: Mapping[str, Any], job: bytes, blocks: bytes | None) -> None:
        """Start `attempt`, after the end of the one before, if there is one.

        Args:
            attempt: rank, world, token and the like; goes to the worker as it is.
            job: the pickled job, made by the driver; opaque here.
            blocks: pickled, makes a block source that has to live in a Ray process; the worker asks this one for
                blocks. It has a `close`, after which no `load` waits any more.
        """

    @abstractmethod
    def send(self, token: str, message: Event) -> None:
        """Pass a message on to the process of attempt `token`; one that has ended hears nothing."""

    @abstractmethod
    def stacks(self) -> str:
        """What the attempt's process is doing: its threads' stacks, or why it cannot say."""

    @abstractmethod
    def is_alive(self) -> bool:
        """Whether there is a process that should send heartbeats."""

    def init_train_context(self, *arguments: Any, **named: Any) -> Any:
        """Ray Train's, which configures this process' logs anew."""
        found = super().init_train_context(*arguments, **named)
        open_log_files()
        return found

    def poll_status(self) -> SlotStatus:
        """Ray Train's poll, with what the worker reported since the last one."""
        status: WorkerStatus = super().poll_status()
        with self._changed:
            events, self._events = self._events, []
            since_heartbeat_s = time.monotonic() - self._heard if self.is_alive() else 0.0
            fields = {name: getattr(status, name) for name in WorkerStatus.__dataclass_fields__}
            return SlotStatus(
                **fields, token=self._token, events=events, since_heartbeat_s=since_heartbeat_s, end=self._end
            )

    def outcome(self) -> tuple[str, Event | None]:
        """The attempt's token, and how its process ended, if it did."""
        return self._token, self._end

    def listening(self, token: str, seconds: float) -> int | None:
        """The port at which rank 0 listens for the others, waited for so long; None if there is none."""
        with self._changed:
            # This call may be faster than `begin`.
            self._changed.wait_for(lambda: self._token == token, seconds)
            self._changed.wait_for(
                lambda: self._token != token or self._end is not None or self._port is not None, seconds
            )
            return self._port if self._token == token else None

    def wait_until_ended(self) -> None:
        """Wait for the end of the attempt: Ray Train's train function.

        A worker that stopped as it was asked to stays here until its group is shut down, since for Ray Train a
        train function that returns is done.

        Raises:
            WorkerError: the process failed.
        """
        with self._changed:
            token = self._token
            self._changed.wait_for(lambda: self._token != token or self._end is not None)
            end = self._end
            if self._token != token or end is None or end["how"] == "done":
                return
            if end["how"] == "stopped":
                self._changed.wait_for(lambda: self._token != token)
                return
        raise WorkerError(end)

    def _reset(self, token: str) -> None:
        with self._changed:
            self._token, self._begun, self._events, self._end = token, False, [], None
            self._port = None
            self._heard = time.monotonic()
            self._changed.notify_all()

    def _note(self, event: Event) -> None:
        with self._changed:
            self._heard = time.monotonic()
            match event["kind"]:
                case "heartbeat":
                    return
                case "listening":
                    self._port = event["port"]
                case "ended":
                    self._end = self._end or event
                case _:
                    self._events.append(event)
            self._changed.notify_all()


_current: Worker | None = None


def current() -> Worker:
    """The worker whose actor this process is."""
    assert _current is not None, "this process is not a worker of this job"
    return _current


def train_fn(config: dict[str, Any]) -> None:
    """What Ray Train calls the training function; the training itself goes on in the attempt's process."""
    current().wait_until_ended()


class WorkerSlot(Worker):
    """A warm worker. Methods block, so it runs with `max_concurrency` threads.

    Args:
        preload: modules that the fork server imports beside torch and DeepSpeed.
    """

    def __init__(self, preload: tuple[str, ...]) -> None:
        with suppress(ValueError):  # only a main thread may
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        super().__init__()
        ours, theirs = Channel.pair()
        fd = theirs.socket.fileno()
        self._forkserver = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.elastic.forkserver", str(fd), *preload],
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment(assigned_gpus())},
        )
        theirs.close_here()
        self._wire = ours
        self._warm: float | None = None
        self._dead = False
        self._worker: Channel | None = None
        self._pid: int | None = None
        self._exited = False
        self._starting = threading.Lock()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="blocks")
        threading.Thread(target=self._listen_to_forkserver, daemon=True).start()

    # --- what the pool asks -----------------------------------------------------------------------------------

    def warm(self) -> float:
        """Wait until a worker can be forked; the seconds that the imports took.

        Raises:
            RuntimeError: the fork server died.
        """
        # What a train context unpickles to; the first attempt should not wait for it.
        import ray.train.v2._internal.execution.controller
        import ray.train.v2.api.data_parallel_trainer  # noqa: F401

        with self._changed:
            self._changed.wait_for(lambda: self._warm is not None or self._dead)
            if self._warm is None:
                raise RuntimeError(
                    f"the fork server ended with {self._forkserver.poll()} while it was importing"
                )
            return self._warm

    def alive(self, seconds: float) -> bool:
        """Answer after so many seconds; a caller learns of this actor's end as soon as Ray does."""
        time.sleep(seconds)
        return True

    # --- what the controller asks -----------------------------------------------------------------------------

    def begin(self, attempt: Mapping[str, Any], job: bytes, blocks: bytes | None) -> None:
        """See :class:`Worker`: fork a process for the attempt."""
        token = attempt["token"]
        with self._starting:
            self.end(self._token)
            ours, theirs = Channel.pair()
            self._reset(token)
            with self._changed:
                self._pid, self._exited, self._worker = None, False, ours
            try:
                # Made by this user's driver and brought by Ray, like any task's arguments.
                source = pickle.loads(blocks)() if blocks is not None else None
            except Exception as error:
                with self._changed:
                    self._exited = True
                self._note(_described(error))
                return
            self._wire.send({}, fd=theirs.socket.fileno())
            theirs.close_here()
            threading.Thread(target=self._listen_to_worker, args=(ours, token, source), daemon=True).start()
            with suppress(OSError):  # it may have died at once, which the fork server reports
                ours.send({"op": "begin", **attempt}, job)
            with self._changed:
                # Not before: whatever were sent earlier would be the first message that the worker gets.
                self._begun = True
                self._changed.notify_all()

    def send(self, token: str, message: Event) -> None:
        """See :class:`Worker`."""
        with self._changed:
            # Ray runs calls side by side: this one may be faster than `begin`.
            self._changed.wait_for(lambda: self._token == token and self._begun, _ANSWER_S)
            worker = self._worker if self._token == token and self._begun else None
        if worker is not None:
            with suppress(OSError):
                worker.send(message)

    def end(self, token: str) -> None:
        """Kill the process of attempt `token`, if there still is one, and wait until it is gone."""
        with self._changed:
            if token != self._token or self._worker is None:
                return
            worker, self._worker = self._worker, None
            self._changed.wait_for(lambda: self._pid is not None or self._dead or self._exited, _ANSWER_S)
            if self._pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
                self._changed.wait_for(lambda: self._pid is None or self._dead, _ANSWER_S)
            self._token = ""
            self._changed.notify_all()
        worker.close()

    def is_alive(self) -> bool:
        """See :class:`Worker`."""
        return self._pid is not None

    def stacks(self) -> str:
        """See :class:`Worker`."""
        pid = self._pid
        if pid is None:
            return "there is no worker process"
        with suppress(OSError):
            state = _state(pid)
            if state.startswith(("T", "t")):
                return f"process {pid} is stopped (state {state})"
            return _dumped_stacks(pid)
        return f"process {pid} is gone"

    # --- what it hears ----------------------------------------------------------------------------------------

    def _listen_to_forkserver(self) -> None:
        while (message := self._wire.receive()) is not None:
            body = message.body
            with self._changed:
                if body["kind"] == "warm":
                    self._warm = body["seconds"]
                elif body["kind"] == "forked":
                    self._pid = body["pid"]
                    self._heard = time.monotonic()
                elif body["kind"] == "exit" and body["pid"] == self._pid:
                    self._pid, self._exited = None, True
                    self._end = self._end or {"kind": "ended", "how": "died", "code": body["code"]}
                self._changed.notify_all()
        self._forkserver.wait()
        with self._changed:
            self._dead = True
            self._end = self._end or {"kind": "ended", "how": "died", "code": "the fork server died"}
            self._changed.notify_all()
        # Without its fork server the slot is of no use; a new one is made in its place.
        os._exit(1)

    def _listen_to_worker(self, channel: Channel, token: str, source: Any) -> None:
        while (message := channel.receive()) is not None:
            if token != self._token:
                break
            if message.body["kind"] == "load":
                self._heard = time.monotonic()
                self._pool.submit(self._load, source, channel, message)
            else:
                self._note(message.body)
        if source is not None:
            # What still waits for a block of this attempt would keep the next one waiting.
            source.close()

    def _load(self, source: Any, channel: Channel, message: Message) -> None:
        request = message.body
        try:
            block = source.load(request["step"], request["index"])
            unreadable = {"unreadable": block.unreadable} if len(block.unreadable) else {}
            fd, layout = pack({"ids": block.ids, **unreadable, **block.arrays})
        except Exception as error:
            answer: dict[str, Any] = {"op": "block", "error": f"{type(error).__name__}: {error}"}
            if isinstance(error, UserError):
                answer["mistake"] = [error.what, error.where, error.hint]
            with suppress(OSError):
                channel.send({**answer, "step": request["step"], "index": request["index"]})
            return
        try:
            with suppress(OSError):
                where = {"step": block.step, "index": block.index}
                channel.send({"op": "block", **where, "layout": layout}, fd=fd)
        finally:
            os.close(fd)


class ColdWorker(Worker):
    """Ray Train's own kind of worker, for `workers_from: stock`: a fresh actor for each attempt that trains itself."""

    def __init__(self) -> None:
        super().__init__()
        self._client: Any = None
        self._work: tuple[Mapping[str, Any], bytes, bytes | None] | None = None

    def begin(self, attempt: Mapping[str, Any], job: bytes, blocks: bytes | None) -> None:
        """See :class:`Worker`: the train function does the work, in a thread of this process."""
        from orchestrator.elastic.worker import LocalClient

        self._reset(attempt["token"])
        self._client, self._work = LocalClient(self._note), (attempt, job, blocks)
        threading.Thread(target=self._train, name="attempt", daemon=True).start()
        with self._changed:
            self._begun = True

    def send(self, token: str, message: Event) -> None:
        """See :class:`Worker`."""
        if token == self._token and self._client is not None:
            self._client.handle(Message(message))

    def end(self, token: str) -> None:
        """Nothing to do here: Ray Train kills the actor."""

    def is_alive(self) -> bool:
        """Never: Ray Train's own health check finds a process that does not answer."""
        return False

    def stacks(self) -> str:
        """See :class:`Worker`."""
        frames = sys._current_frames()
        texts = []
        for thread in threading.enumerate():
            if thread.ident in frames:
                stack = "".join(traceback.format_stack(frames[thread.ident]))
                texts.append(f"thread {thread.name}:\n{stack}")
        return "\n".join(texts)

    def _train(self) -> None:
        from orchestrator.elastic.worker import run_attempt

        assert self._work is not None
        attempt, job, blocks = self._work
        try:
            source = pickle.loads(blocks) if blocks is not None else None
        except Exception as error:
            self._note(_described(error))
            return
        run_attempt(attempt, job, self._client, source)


def _described(error: Exception) -> Event:
    text = "".join(traceback.format_exception(error))
    return {
        "kind": "ended",
        "how": "error",
        "type": type(error).__name__,
        "message": str(error),
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
