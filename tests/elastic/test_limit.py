"""Two jobs on a real cluster of raylets, whose sizes follow one split of its machines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.capacity.allocate import StudentCost, TeacherCost
from orchestrator.capacity.rebalance import Balancer, cluster_devices
from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster
from orchestrator.elastic.controller_host import hosts
from tools.market import SpotMarket

sys.path.insert(0, str(Path(__file__).parent))
from paced import paced_job
from running import PATIENCE_S, Running

STEPS = 200


@pytest.fixture(scope="module")
def market() -> Iterator[SpotMarket]:
    """Four machines of one place each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        with SpotMarket() as market:
            for number in range(4):
                market.add(f"m{number}")
            with cluster.start(Cluster(address=market.address)):
                yield market


def eventually(what: Callable[[], bool], *jobs: Running) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        lines = [job.lines for job in jobs]
        assert time.monotonic() < deadline, lines
        assert all(job.thread.is_alive() for job in jobs), (lines, [job.error for job in jobs])
        time.sleep(0.05)


@pytest.mark.slow
def test_a_split_follows_machines_that_go_and_come_and_nothing_else_changes(
    market: SpotMarket, tmp_path: Path
) -> None:
    """On 2, 3 and 4 machines beside a teacher's, which is none here: 1 + 1, 2 + 1 and 2 + 2 workers."""
    costs = [StudentCost("a", 4, 1.0), StudentCost("b", 4, 0.9)]
    balancer = Balancer(TeacherCost(0.1), costs, lambda: cluster_devices("cpu") + 1)
    jobs = {name: paced_job(tmp_path / name, STEPS, num_blocks=4) for name in ("a", "b")}
    for name in jobs:
        (tmp_path / f"{name}-faults" / "slow").touch()
    running = {name: Running(replace(job, limit=balancer.quota(name))) for name, job in jobs.items()}
    a, b = running["a"], running["b"]
    try:
        eventually(lambda: (a.workers(), b.workers()) == (2, 2), a, b)
        of_a = next(slot["node"] for slot in hosts.slots() if slot["job"] == a.job.name)
        market.kill(next(name for name, node in market.machines.items() if node.node_id == of_a))
        # Who lost nothing gives a worker up, who lost one gets it.
        eventually(lambda: (a.workers(), b.workers()) == (2, 1), a, b)
        assert any("others need them more" in line for line in b.lines), b.lines
        market.add("another")
        eventually(lambda: (a.workers(), b.workers()) == (2, 2), a, b)
        for name in jobs:
            (tmp_path / f"{name}-faults" / "slow").unlink()
        found = {name: job.weights() for name, job in running.items()}
    finally:
        for job in running.values():
            job.stop.set()
            job.thread.join(PATIENCE_S)
    assert not any("is gone" in line for line in b.lines), "b lost no machine, and no step"
    for name, job in jobs.items():
        alone = paced_job(tmp_path / "alone" / name, STEPS, num_blocks=job.num_blocks)
        wanted = Running(replace(alone, elastic=job.elastic.model_copy(update={"workers": (1, 1)}))).weights()
        for key, value in wanted.items():
            assert np.linalg.norm(found[name][key] - value) <= 1e-5 * np.linalg.norm(value), (name, key)
