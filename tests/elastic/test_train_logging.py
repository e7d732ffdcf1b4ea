"""Several of Ray Train's controllers log from one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.execution.context import TrainRunContext

from orchestrator.config.elastic import Elastic
from orchestrator.elastic.controller import STUCK_S, ControllerStuckError, ElasticRun, RunSpec
from orchestrator.elastic.ray_pool import RayWorkerPool
from orchestrator.elastic.resources import SlotShape

# Each thread is a controller that starts: it configures, then writes its first record.
CONTROLLERS = """
import faulthandler, logging, sys, threading
from pathlib import Path
from types import SimpleNamespace
import ray
from ray.train import RunConfig
from ray.train.v2._internal.logging import LoggingManager
from orchestrator.elastic.train_logging import ControllerLogging, logs_of_run

faulthandler.dump_traceback_later(100, exit=True)
folder, manager = Path(sys.argv[1]), {"ours": ControllerLogging, "ray's": LoggingManager}[sys.argv[2]]
LoggingManager.get_log_directory = staticmethod(lambda: str(folder))
ray.get_runtime_context = lambda: SimpleNamespace(get_worker_id=lambda: "1")
sys.setswitchinterval(1e-6)

def controller(number, barrier):
    name = f"toy/{number}"
    barrier.wait()
    with logs_of_run(name):
        manager.configure_controller_logger(SimpleNamespace(get_run_config=lambda: RunConfig(name=name)))
        for record in range(3):
            logging.getLogger("ray.train").debug("record %d", record)

for round in range(int(sys.argv[3])):
    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=controller, args=(number, barrier)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


@pytest.mark.heavy
def test_controllers_that_start_at_once_do_not_wait_for_each_other_and_keep_their_names(
    tmp_path: Path,
) -> None:
    """With Ray's own manager this stands still within a hundred rounds, and every record has the last name."""
    arguments = [sys.executable, "-c", CONTROLLERS, str(tmp_path), "ours", "100"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (log,) = tmp_path.glob("ray-train-sys-controller-*.log")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    names = [record["run_name"] for record in records if record["message"].startswith("record ")]
    assert sorted(names) == sorted(f"toy/{number}" for number in range(8) for _ in range(300))


def test_a_controller_that_does_not_move_is_told(tmp_path: Path) -> None:
    context = TrainRunContext(
        run_config=RunConfig(name="toy", failure_config=FailureConfig(max_failures=-1)),
        train_loop_config=None,
        scaling_config=ScalingConfig(num_workers=1),
        backend_config=None,
        dataset_config=None,
    )
    spec = RunSpec("toy", 1, 1, tmp_path, "file:///nowhere", Elastic(), (1, 1), SlotShape())
    run = ElasticRun(spec, RayWorkerPool(), context)
    assert run.poll_events(0.0) == []
    run.moved -= STUCK_S + 1
    with pytest.raises(ControllerStuckError, match="has made no progress for 301 s"):
        run.poll_events(0.0)
    run.close()
    run.poll_events(0.0)
