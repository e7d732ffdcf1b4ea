"""A warm slot and its worker, without a cluster: what overtakes what, and what a slow actor does to the controller."""

from __future__ import annotations

import pickle
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator.elastic import worker_slot
from orchestrator.elastic.channel import Channel
from orchestrator.elastic.worker_group import _BoundedRay
from orchestrator.elastic.worker_slot import WorkerSlot

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_job


@pytest.fixture(scope="module")
def slot() -> Iterator[WorkerSlot]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        slot = WorkerSlot(())
    slot.warm()
    yield slot
    # Its end would end this process: without a fork server an actor is of no use.
    slot.end(slot._token)


def attempt(token: str, num_blocks: int) -> dict[str, Any]:
    common = {"mtbf_s": 3600.0, "stall_timeout_s": 60.0, "proxied": False, "num_blocks": num_blocks}
    return {"token": token, "rank": 0, "world": 1, "host": "127.0.0.1", **common}


def ended(slot: WorkerSlot, token: str) -> Mapping[str, Any]:
    deadline = time.monotonic() + 60
    while (found := slot.outcome())[1] is None or found[0] != token:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found[1]


def acknowledge(slot: WorkerSlot, token: str) -> None:
    """Play the driver: all steps are written down."""
    while slot.outcome() == (token, None):
        slot.send(token, {"op": "recorded", "step": 10**6})
        time.sleep(0.05)


def test_a_message_that_overtakes_begin_is_not_the_workers_first(
    slot: WorkerSlot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token fits before the worker has its job: what is sent then has to wait for it."""
    real, begins = Channel.send, threading.Event()

    def late(channel: Channel, body: Mapping[str, Any], payload: bytes = b"", fd: int | None = None) -> None:
        if body.get("op") == "begin":
            begins.set()
            time.sleep(0.5)
        real(channel, body, payload, fd)

    monkeypatch.setattr(Channel, "send", late)
    job = tiny_job(tmp_path / "overtaken", 50, 1)
    begin = threading.Thread(
        target=slot.begin, args=(attempt("first", job.num_blocks), pickle.dumps(job.for_workers()), None)
    )
    begin.start()
    assert begins.wait(10)
    slot.send("first", {"op": "stop"})  # faster than `begin`
    begin.join()
    threading.Thread(target=acknowledge, args=(slot, "first"), daemon=True).start()
    assert ended(slot, "first")["how"] == "stopped", "not EOFError: Ran out of input"


def test_messages_of_other_attempts_reach_nobody(slot: WorkerSlot, tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "second", 10, 1)
    slot.begin(attempt("second", job.num_blocks), pickle.dumps(job.for_workers()), None)
    threading.Thread(target=slot.send, args=("first", {"op": "stop"}), daemon=True).start()
    acknowledge(slot, "second")
    assert ended(slot, "second")["how"] == "done"


def test_blocks_that_cannot_be_made_end_the_attempt_and_not_the_slot(
    slot: WorkerSlot, tmp_path: Path
) -> None:
    job = tiny_job(tmp_path / "third", 10, 1)
    broken = pickle.dumps(_no_blocks)
    slot.begin(attempt("third", job.num_blocks), pickle.dumps(job.for_workers()), broken)
    end = ended(slot, "third")
    assert (end["how"], end["type"], end["message"]) == ("error", "ValueError", "no blocks here")
    began = time.monotonic()
    slot.end("third")
    assert time.monotonic() - began < worker_slot._ANSWER_S, "there is no process to wait for"


def _no_blocks() -> None:
    raise ValueError("no blocks here")


def test_every_get_in_the_controller_has_a_limit() -> None:
    """An actor that never answers costs the limit, not the run."""
    bounded = _BoundedRay(0.2)
    seen: list[float | None] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "get", lambda refs, timeout=None: seen.append(timeout))
        bounded.get("ref")
        bounded.get("ref", timeout=3.0)
        with bounded.patient(9.0):
            bounded.get("ref")
        bounded.get("ref")
    assert seen == [0.2, 3.0, 9.0, 0.2]
    assert bounded.exceptions is ray.exceptions
