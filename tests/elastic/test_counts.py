"""Any numbers of workers, one after another, any number of blocks: the same job. Drawn at random, run for real.

Workers are forked by a fork server and join over gloo as they do in a slot; only Ray is left out.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from orchestrator.elastic.channel import Channel
from orchestrator.training.job import Job

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_job

STEPS = 10


class ForkServer:
    """Forks groups of workers and plays the controller for them."""

    def __init__(self) -> None:
        ours, theirs = Channel.pair()
        fd = theirs.socket.fileno()
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "orchestrator.elastic.forkserver", str(fd)]
        self.process = subprocess.Popen(command, pass_fds=(fd,), env={**env, "OMP_NUM_THREADS": "1"})
        theirs.close_here()
        self.channel = ours
        message = ours.receive()
        assert message is not None
        assert message.body["kind"] == "warm"

    def run(self, job: Job, world: int, token: str, steps: int) -> dict[int, dict[str, float]]:
        """Train until the end, or for `steps` steps; metrics by step."""
        channels = []
        for _ in range(world):
            ours, theirs = Channel.pair()
            self.channel.send({}, fd=theirs.socket.fileno())
            theirs.close_here()
            channels.append(ours)
        metrics: dict[int, dict[str, float]] = {}
        ends: list[Any] = [None] * world

        def listen(rank: int) -> None:
            while (message := channels[rank].receive()) is not None:
                body = message.body
                if body["kind"] == "listening":
                    for other in channels[1:]:
                        other.send({"op": "peers", "host": "127.0.0.1", "port": body["port"]})
                elif body["kind"] == "step":
                    metrics[body["step"]] = body["metrics"]
                    if len(metrics) == steps:
                        channels[0].send({"op": "stop"})
                elif body["kind"] == "record":
                    channels[0].send({"op": "recorded", "step": body["step"]})
                elif body["kind"] == "ended":
                    ends[rank] = body

        threads = [threading.Thread(target=listen, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        common = {"mtbf_s": 3600.0, "stall_timeout_s": 60.0, "proxied": False, "num_blocks": job.num_blocks}
        for rank, channel in enumerate(channels):
            attempt = {"rank": rank, "world": world, "token": token, "host": "127.0.0.1"}
            channel.send({"op": "begin", **common, **attempt}, pickle.dumps(job))
        for thread in threads:
            thread.join(120)
        assert all(end is not None and end["how"] in ("done", "stopped") for end in ends), ends
        return metrics


@pytest.fixture(scope="module")
def forkserver() -> Iterator[ForkServer]:
    forkserver = ForkServer()
    yield forkserver
    forkserver.channel.close()
    forkserver.process.wait(30)


SEGMENTS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)


# Each example trains in processes of its own: shrinking one that fails would take minutes.
@pytest.mark.long
@settings(
    max_examples=3,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(num_blocks=st.integers(1, 7), segments=SEGMENTS, zero_stage=st.sampled_from([0, 1, 2, 3]))
def test_counts_blocks_and_steps_drawn_at_random(
    forkserver: ForkServer, tmp_path: Path, num_blocks: int, segments: list[tuple[int, int]], zero_stage: int
) -> None:
    from dataclasses import replace

    for name in ("alone", "drawn"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    alone = tiny_job(tmp_path / "alone", STEPS, 1, num_blocks=num_blocks, step_s=0.0)
    drawn = tiny_job(tmp_path / "drawn", STEPS, 1, num_blocks=num_blocks, step_s=0.0)
    drawn = replace(drawn, zero_stage=zero_stage)
    reference = forkserver.run(alone, 1, "alone", STEPS + 1)
    got: dict[int, dict[str, float]] = {}
    for number, (world, steps) in enumerate([*segments, (2, STEPS + 1)]):
        if STEPS not in got:
            new = forkserver.run(drawn, world, f"group{number}", steps)
            assert not got.keys() & new.keys(), "no step is done twice"
            got |= new
    assert sorted(got) == list(range(1, STEPS + 1))
    for step, metrics in reference.items():
        assert got[step]["sample_order"] == metrics["sample_order"]
        assert got[step]["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
        assert got[step]["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-4)
    ours, theirs = load_file(drawn.export(STEPS)), load_file(alone.export(STEPS))
    for name, value in theirs.items():
        assert np.linalg.norm(ours[name] - value) <= 1e-5 * np.linalg.norm(value), name
