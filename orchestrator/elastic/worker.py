"""The process that trains: forked from a zygote for one attempt, it joins its group, trains, and says how it ended."""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import pickle
import signal
import threading
import time
import traceback
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from orchestrator.elastic.wire import Message, Wire, unpack
from orchestrator.errors import UserError
from orchestrator.store.open import fetch

if TYPE_CHECKING:
    from orchestrator.data.blocks import Block
    from orchestrator.elastic.job import Job

logger = logging.getLogger("orchestrator")

_BEAT_S = 1.0
# What torch and DeepSpeed import in the middle of the first steps: three quarters of a restart.
_IMPORTED_LATE = (
    "torch._dynamo",
    "torch._inductor",
    "torch.onnx",
    "torch.distributed.tensor",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "pyarrow.dataset",
    "pandas",
)
# What torch's backends say when a peer is gone; their exceptions are plain RuntimeErrors.
_BROKEN = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "socket timeout")


def warm_up() -> None:
    """Import what every worker needs; called once, in the zygote."""
    from orchestrator.elastic.zero import import_deepspeed

    import_deepspeed()
    for module in ("orchestrator.elastic.loop", *_IMPORTED_LATE):
        with suppress(ImportError):  # then it will not be imported later either
            importlib.import_module(module)


def main(wire: Wire) -> int:
    """Run the attempt that comes over `wire`; returns the exit code."""
    _prepare_process()
    message = wire.receive()
    if message is None:
        return 1
    attempt = message.body
    link = Link(wire)
    try:
        # Made by this user's driver and brought by Ray, like any task's arguments.
        job: Job = pickle.loads(message.payload)
        for where, kind, key in job.inputs:
            fetch(where, kind, key)
        how = "done" if _train(job, attempt, link) else "yielded"
    except BaseException as error:
        logger.error("%s", "".join(traceback.format_exception(error)).rstrip())
        link.send({"kind": "ended", "how": "error", "step": link.step, **_described(error)})
        return 1
    link.send({"kind": "ended", "how": how})
    return 0


def _prepare_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The seat reads this file through /proc when it wants to know what hangs; it vanishes with the process.
    faulthandler.register(signal.SIGUSR1, os.fdopen(os.memfd_create("stacks"), "w"), all_threads=True)


def _train(job: Job, attempt: dict[str, Any], link: Link) -> bool:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.distributed_c10d import PrefixStore

    from orchestrator.elastic.loop import train
    from orchestrator.elastic.zero import import_deepspeed

    rank, world = int(attempt["rank"]), int(attempt["world"])
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(0)  # Ray shows each seat its own
    else:
        torch.set_num_threads(1)
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", 0)):
        os.environ[name] = str(value)
    if attempt["proxied"]:
        job = replace(job, blocks=lambda: SeatBlocks(link, attempt["num_blocks"]))
    # The controller's own watch comes first: it knows who hangs and where, a collective only that somebody does.
    timeout = timedelta(seconds=2 * attempt["hang_s"] + 30)
    if rank == 0:
        # Port 0: the system picks one that is free, whatever else runs on this machine.
        store = TCPStore("0.0.0.0", 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
        link.send({"kind": "listening", "port": store.port})
    else:
        host, port = link.peers()
        store = TCPStore(host, port, world, is_master=False, timeout=timeout)
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        store=PrefixStore(attempt["token"], store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    import_deepspeed().init_distributed(dist.get_backend(), dist_init_required=False, verbose=False)
    link.phase("joined")
    return train(job, link, attempt["mtbf_s"])


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


class Link:
    """A worker's end of the line to its seat, and through it to the controller. Nothing here waits for the driver.

    Attributes:
        step: updates done, as last reported.
    """

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.step = -1
        self._yield = threading.Event()
        self._peers: Future[tuple[str, int]] = Future()
        self._acked = self._asked = -1
        self._blocks: dict[tuple[int, int], Future[Message]] = {}
        for target in (self._listen, self._beat):
            threading.Thread(target=target, daemon=True).start()

    def send(self, body: dict[str, Any]) -> None:
        """Tell the controller something."""
        self._wire.send(body)

    def phase(self, name: str) -> None:
        """A part of the start is done: a sign of life, and a line in the account of a restart."""
        self.send({"kind": "phase", "name": name, "time": time.time()})

    def report(self, step: int, figures: dict[str, float], stall_s: float) -> None:
        """Hand over the figures of the step that took the count to `step` (worker 0)."""
        self.step = step
        self.send({"kind": "step", "step": step, "figures": figures, "stall": stall_s})

    def saved(self, step: int, figures: dict[str, float]) -> None:
        """The checkpoint after `step` is committed (worker 0)."""
        self.send({"kind": "saved", "step": step, "figures": figures})

    def trouble(self, what: str) -> None:
        """Something went wrong that does not stop the training."""
        self.send({"kind": "trouble", "what": what})

    def recorded(self, step: int) -> bool:
        """Whether the driver has written down everything up to `step`; asks it to at the first call for a step."""
        if step > self._asked:
            self._asked = step
            self.send({"kind": "record", "step": step})
        return self._acked >= step

    def yield_requested(self) -> bool:
        """Whether the controller wants the group to checkpoint and end."""
        return self._yield.is_set()

    def peers(self) -> tuple[str, int]:
        """Where worker 0 listens; waits until that is known."""
        return self._peers.result()

    def load(self, step: int, index: int) -> Message:
        """Ask the seat for a block."""
        answer: Future[Message] = Future()
        self._blocks[step, index] = answer
        self.send({"kind": "load", "step": step, "index": index})
        return answer.result()

    def _listen(self) -> None:
        while (message := self._wire.receive()) is not None:
            body = message.body
            match body["op"]:
                case "yield":
                    self._yield.set()
                case "peers":
                    self._peers.set_result((body["host"], body["port"]))
                case "recorded":
                    self._acked = max(self._acked, body["step"])  # calls may overtake each other
                case "block":
                    self._blocks.pop((body["step"], body["index"])).set_result(message)
        # The seat is gone, and with it whoever would hear of this worker.
        os._exit(1)

    def _beat(self) -> None:
        while True:
            time.sleep(_BEAT_S)
            try:
                self.send({"kind": "beat"})
            except OSError:
                os._exit(1)


class SeatBlocks:
    """A `BlockSource` whose blocks are made in the seat, a process that Ray knows, and shared without a copy."""

    def __init__(self, link: Link, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._link = link

    def load(self, step: int, index: int) -> Block:
        """See :class:`orchestrator.data.blocks.BlockSource`."""
        from orchestrator.data.blocks import Block

        message = self._link.load(step, index)
        if "error" in message.body:
            raise RuntimeError(f"block {index} of step {step} did not come: {message.body['error']}")
        assert message.fd is not None
        arrays = unpack(message.fd, message.body["layout"])
        return Block(step, index, arrays.pop("ids"), arrays)
