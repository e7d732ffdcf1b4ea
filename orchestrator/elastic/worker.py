"""The process that trains: started for one attempt, it joins its group, trains, and reports how it ended."""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import pickle
import signal
import socket
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from orchestrator.byte_counts import BYTES
from orchestrator.elastic.channel import Channel, Message, unpack
from orchestrator.errors import UserError
from orchestrator.storage.open import fetch
from orchestrator.training.device import CPU, device

if TYPE_CHECKING:
    from orchestrator.data.blocks import Block, BlockSource
    from orchestrator.training.job import Job

logger = logging.getLogger("orchestrator")

# Where all slots are on one machine, nothing listens on a network.
LOOPBACK = "127.0.0.1"
_HEARTBEAT_S = 1.0
# What torch and DeepSpeed import in the middle of the first steps: three quarters of a restart.
_IMPORTED_LATE = (
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "torch.distributed.tensor",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
)
# What torch's backends say when a peer is gone; their exceptions are plain RuntimeErrors.
_BROKEN = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket timeout")


def warm_up() -> None:
    """Import what every worker needs; called once, in the fork server."""
    from orchestrator.training.zero import import_deepspeed

    import_deepspeed()
    for module in ("orchestrator.training.loop", *_IMPORTED_LATE):
        with suppress(ImportError):  # then it will not be imported later either
            importlib.import_module(module)


def main(channel: Channel) -> int:
    """Run the attempt that comes over `channel`; returns the exit code."""
    _prepare_process()
    message = channel.receive()
    if message is None:
        return 1
    return run_attempt(message.body, message.payload, ChannelClient(channel))


def run_attempt(
    attempt: Mapping[str, Any],
    job: bytes,
    client: ControllerClient,
    blocks: Callable[[], BlockSource] | None = None,
) -> int:
    """Run one attempt at a job in this process, and report how it ended; returns an exit code.

    Args:
        attempt: `rank`, `world`, `token`, `host` (the address to listen at), `num_blocks`, `mtbf_s`,
            `stall_timeout_s`, and `proxied`: blocks are made in the slot.
        job: the pickled job.
        client: the way to the controller.
        blocks: makes the blocks in this process, in place of the job's own.
    """
    try:
        rendezvous = _listen(attempt, client) if attempt["rank"] == 0 else None
        # Made by this user's driver and brought by Ray, like any task's arguments.
        loaded: Job = pickle.loads(job)
        for needed in loaded.inputs:
            fetch(*needed)
        if blocks is not None:
            loaded = replace(loaded, blocks=blocks)
        elif attempt["proxied"]:
            loaded = replace(loaded, blocks=lambda: SlotBlocks(client, attempt["num_blocks"]))
        how = "done" if _train(loaded, attempt, client, rendezvous) else "stopped"
    except BaseException as error:
        logger.error("%s", "".join(traceback.format_exception(error)).rstrip())
        client.send_bytes()
        client.send({"kind": "ended", "how": "error", "step": client.step, **_described(error)})
        return 1
    client.send_bytes()
    client.send({"kind": "ended", "how": how})
    return 0


def _prepare_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The slot reads this file through /proc when it wants to know what hangs; it vanishes with the process.
    faulthandler.register(signal.SIGUSR1, os.fdopen(os.memfd_create("stacks"), "w"), all_threads=True)


def _listen(attempt: Mapping[str, Any], client: ControllerClient) -> Any:
    """Rank 0's key-value store, which the others join; it listens at the attempt's address only."""
    from torch._C._distributed_c10d import TCPStore

    # Port 0: the system picks one that is free, whatever else runs on this machine.
    listener = socket.create_server((attempt["host"], 0), backlog=max(128, attempt["world"]))
    port = listener.getsockname()[1]
    store = TCPStore(
        attempt["host"],
        port,
        attempt["world"],
        is_master=True,
        timeout=_timeout(attempt),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    client.send({"kind": "listening", "port": port})
    return store


def _timeout(attempt: Mapping[str, Any]) -> timedelta:
    # The controller's own watch comes first: it knows who hangs and where, a collective only that somebody does.
    return timedelta(seconds=2 * attempt["stall_timeout_s"] + 30)


def _train(job: Job, attempt: Mapping[str, Any], client: ControllerClient, rendezvous: Any) -> bool:
    import torch
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.distributed_c10d import PrefixStore

    from orchestrator.training.loop import train
    from orchestrator.training.process_group import join

    rank, world = int(attempt["rank"]), int(attempt["world"])
    if device() == CPU:
        torch.set_num_threads(1)
    if attempt["host"] == LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = _timeout(attempt)
    if rendezvous is None:
        host, port = client.peers()
        rendezvous = TCPStore(host, port, world, is_master=False, timeout=timeout)
    join(PrefixStore(attempt["token"], rendezvous), rank, world, timeout)
    client.phase("joined")
    return train(job, client, attempt["mtbf_s"])


def _described(error: BaseException) -> dict[str, Any]:
    text = "".join(traceback.format_exception(error))
    described = {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": text,
        "broken": _is_broken(error),
    }
    if isinstance(error, UserError):
        described["mistake"] = {"what": error.what, "where": error.where, "hint": error.hint}
    return described


def _is_broken(error: BaseException) -> bool:
    """Whether a peer or the network went, rather than anything here."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _BROKEN)


class ControllerClient(ABC):
    """A worker's way to the controller. Nothing here waits for the driver.

    Attributes:
        step: updates done, as last reported.
    """

    def __init__(self) -> None:
        self.step = -1
        self._stop = threading.Event()
        self._peers: Future[tuple[str, int]] = Future()
        self._acked = self._asked = -1
        self._blocks: dict[tuple[int, int], Future[Message]] = {}

    @abstractmethod
    def send(self, body: dict[str, Any]) -> None:
        """Report something to the controller."""

    def send_bytes(self) -> None:
        """Report the bytes that this process read and wrote since it last did, if any."""
        if counted := BYTES.take():
            self.send({"kind": "bytes", "values": counted})

    def handle(self, message: Message) -> None:
        """Take in what the controller, or the slot, sent."""
        body = message.body
        match body["op"]:
            case "stop":
                self._stop.set()
            case "peers":
                self._peers.set_result((body["host"], body["port"]))
            case "recorded":
                self._acked = max(self._acked, body["step"])  # calls may overtake each other
            case "block":
                self._blocks.pop((body["step"], body["index"])).set_result(message)

    def phase(self, name: str) -> None:
        """A part of the start is done. This counts as a heartbeat, and is a line in the account of a restart."""
        self.send({"kind": "phase", "name": name, "time": time.time()})

    def report(
        self, step: int, metrics: dict[str, float], stall_s: float, held_out: Mapping[str, float]
    ) -> None:
        """See :class:`~orchestrator.training.callback.TrainerCallback` (worker 0)."""
        self.step = step
        self.send(
            {
                "kind": "step",
                "step": step,
                "metrics": metrics,
                "stall": stall_s,
                "held_out": dict(held_out),
            }
        )

    def looked(self, step: int, held_out: Mapping[str, float]) -> None:
        """See :class:`~orchestrator.training.callback.TrainerCallback` (worker 0)."""
        self.send({"kind": "look", "step": step, "held_out": dict(held_out)})

    def saved(self, step: int, metrics: dict[str, float]) -> None:
        """The checkpoint after `step` is committed (worker 0)."""
        self.send({"kind": "saved", "step": step, "metrics": metrics})

    def trouble(self, what: str) -> None:
        """Something went wrong that does not stop the training."""
        self.send({"kind": "trouble", "what": what})

    def recorded(self, step: int) -> bool:
        """Whether the driver has written down everything up to `step`; asks it to at the first call for a step."""
        if step > self._asked:
            self._asked = step
            self.send({"kind": "record", "step": step})
        return self._acked >= step

    def stop_requested(self) -> bool:
        """Whether the controller wants the group to checkpoint and stop."""
        return self._stop.is_set()

    def peers(self) -> tuple[str, int]:
        """Where worker 0 listens; waits until that is known."""
        return self._peers.result()

    def load(self, step: int, index: int) -> Message:
        """Ask the slot for a block."""
        answer: Future[Message] = Future()
        self._blocks[step, index] = answer
        self.send({"kind": "load", "step": step, "index": index})
        return answer.result()


class ChannelClient(ControllerClient):
    """The client of a forked process: over a socket to its slot, with a heartbeat every second."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel
        for target in (self._listen, self._beat):
            threading.Thread(target=target, daemon=True).start()

    def send(self, body: dict[str, Any]) -> None:
        """See :class:`ControllerClient`."""
        self._channel.send(body)

    def _listen(self) -> None:
        while (message := self._channel.receive()) is not None:
            self.handle(message)
        # The slot is gone, and with it whoever would hear of this worker.
        os._exit(1)

    def _beat(self) -> None:
        while True:
            time.sleep(_HEARTBEAT_S)
            try:
                self.send({"kind": "heartbeat"})
                self.send_bytes()
            except OSError:
                os._exit(1)


class LocalClient(ControllerClient):
    """The client of a worker that trains in its own actor."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._send = send

    def send(self, body: dict[str, Any]) -> None:
        """See :class:`ControllerClient`."""
        self._send(body)


class SlotBlocks:
    """A `BlockSource` whose blocks are made in the slot, a process that Ray knows, and shared without a copy."""

    def __init__(self, client: ControllerClient, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._client = client

    def load(self, step: int, index: int) -> Block:
        """See :class:`orchestrator.data.blocks.BlockSource`."""
        from orchestrator.data.blocks import Block, with_unreadable

        message = self._client.load(step, index)
        if "mistake" in message.body:
            what, where, hint = message.body["mistake"]
            raise UserError(what, where=where, hint=hint)
        if "error" in message.body:
            raise RuntimeError(f"block {index} of step {step} could not be loaded: {message.body['error']}")
        assert message.fd is not None
        arrays = unpack(message.fd, message.body["layout"])
        ids, unreadable = arrays.pop("ids"), arrays.pop("unreadable", None)
        return with_unreadable(Block(step, index, ids, arrays), unreadable)
