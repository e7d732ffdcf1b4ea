"""What a process computes on follows what it was given, on a real cluster whose GPUs only Ray believes in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle

from orchestrator.capacity import measured_costs
from orchestrator.config.schema import Cluster
from orchestrator.elastic import cluster
from orchestrator.elastic.resources import SlotShape, slot_of, workers_of
from orchestrator.errors import UserError
from orchestrator.teacher_service.payload import TEACHER, Parts
from orchestrator.teacher_service.service import TeacherService
from orchestrator.training import device
from orchestrator.training.job import Job
from tools.market import SpotMarket

sys.path.insert(0, str(Path(__file__).parent))
from running import PATIENCE_S, Running
from tiny import DeviceTask, tiny_job

# The actors below live in processes that cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

NODES: dict[str, str] = {}


@pytest.fixture(scope="module")
def market() -> Iterator[SpotMarket]:
    """A machine with two GPUs, both of which any process on it can see, and one without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        with SpotMarket() as market:
            two = {"num_gpus": 2, "labels": {"pool": "fast"}, "resources": {"accelerator_type:H100": 1}}
            NODES[market.add("gpus", slots=2, **two)] = "gpus"
            NODES[market.add("none", slots=1, labels={"pool": "slow"})] = "none"
            with cluster.start(Cluster(address=market.address)):
                yield market


class Process:
    """Reports what it was given."""

    def report(self) -> dict[str, Any]:
        from orchestrator.training.device import assigned_gpus, device

        return {
            "gpus": assigned_gpus(),
            "device": device(),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "node": ray.get_runtime_context().get_node_id(),
            "secret": os.environ.get("SECRET"),
        }


class RecordingTeacher:
    """A teacher that writes down what its process was given."""

    images_per_step = 4

    def __init__(self, file: Path) -> None:
        self.images_forwarded = 0
        text = f"{device.device()} {os.environ.get('CUDA_VISIBLE_DEVICES')!r}"
        file.write_text(text)

    def __call__(self, step: int) -> Parts:
        self.images_forwarded += self.images_per_step
        return {TEACHER: {"ids": np.arange(4)}}


def given(shape: SlotShape, number: int = 1) -> list[dict[str, Any]]:
    """What this many slots of a shape, all at once, were given."""
    actors = [ray.remote(Process).options(**shape.ray_options()).remote() for _ in range(number)]
    try:
        return list(ray.get([actor.report.remote() for actor in actors], timeout=PATIENCE_S))
    finally:
        for actor in actors:
            ray.kill(actor)


def job(tmp_path: Path, workers: Any = 1, num_blocks: int = 5, **elastic: Any) -> Job:
    return tiny_job(tmp_path / "pretrain", 1, workers, num_blocks=num_blocks, **elastic)


def test_each_slot_has_a_gpu_of_its_own_and_its_process_counts_it_as_the_first(
    market: SpotMarket, tmp_path: Path
) -> None:
    shape = slot_of(job(tmp_path))
    assert shape == SlotShape(0.0, 1.0)
    found = given(shape, 2)
    assert sorted(one["gpus"] for one in found) == [("0",), ("1",)]
    assert all(one["visible"] == one["gpus"][0] for one in found)
    assert {one["device"] for one in found} == {"cuda:0"}


def test_device_cpu_on_a_machine_with_gpus_computes_on_cpus(market: SpotMarket, tmp_path: Path) -> None:
    cpu = job(tmp_path, device="cpu", resources={"gpu": 1, "labels": {"pool": "fast"}})
    (found,) = given(slot_of(cpu))
    assert NODES[found["node"]] == "gpus"
    assert found["visible"] == "0,1", "Ray shows them all to a process that asked for none"
    assert (found["gpus"], found["device"]) == ((), "cpu")


def test_a_slot_is_on_a_node_with_its_labels_and_has_its_environment(
    market: SpotMarket, tmp_path: Path
) -> None:
    elsewhere = job(
        tmp_path,
        resources={"labels": {"pool": "!fast"}, "runtime_env": {"env_vars": {"SECRET": "hunter2"}}},
    )
    (found,) = given(slot_of(elsewhere))
    assert (found["device"], found["secret"]) == ("cpu", "hunter2")
    for selector, name in (("!fast", "none"), ("fast", "gpus"), ("in(slow,other)", "none")):
        chosen = job(tmp_path, device="cpu", resources={"labels": {"pool": selector}})
        (found,) = given(slot_of(chosen))
        assert NODES[found["node"]] == name
    typed = job(tmp_path, resources={"accelerator_type": "H100", "memory": "100MB"})
    (found,) = given(slot_of(typed))
    assert NODES[found["node"]] == "gpus"


def test_workers_auto_is_every_device_of_this_cluster(market: SpotMarket, tmp_path: Path) -> None:
    auto = job(tmp_path, "auto")
    assert workers_of(auto, slot_of(auto)) == (1, 2)
    cpus = job(tmp_path, "auto", device="cpu")
    assert workers_of(cpus, slot_of(cpus)) == (1, 3)
    small = job(tmp_path, "auto", num_blocks=2, device="cpu")
    assert workers_of(small, slot_of(small)) == (1, 2), "a step of two blocks has work for two"
    split = replace(cpus, limit=lambda: (2, 2))
    assert workers_of(split, slot_of(split)) == (2, 2)


def test_what_this_cluster_does_not_have_is_refused_before_any_worker(
    market: SpotMarket, tmp_path: Path
) -> None:
    for resources, message in (
        ({"labels": {"pool": "fasst"}}, "1 × pool=fast; 1 × pool=slow"),
        ({"accelerator_type": "H10"}, "did you mean 'H100'?"),
        ({"gpu": 4}, "no node of the cluster is large enough"),
        (
            {"labels": {"pool": "slow"}},
            "no node of the cluster with the accelerator and labels of its workers has a",
        ),
    ):
        wanted = job(tmp_path, device="gpu", resources=resources)
        with pytest.raises(UserError) as caught:
            slot_of(wanted)
        assert message in str(caught.value)
        assert "stages.pretrain" in str(caught.value)
    student = replace(job(tmp_path, device="gpu", resources={"labels": {"pool": "slow"}}), name="distill/s")
    with pytest.raises(UserError) as caught:
        slot_of(student)
    assert caught.value.where == "stages.distill.elastic.device"
    student = replace(job(tmp_path, resources={"labels": {"pool": "x"}}), name="distill/s")
    with pytest.raises(UserError) as caught:
        slot_of(student)
    assert caught.value.where == "stages.distill.students.s.resources.labels"


def test_a_teacher_squeezed_in_without_a_gpu_does_not_land_on_that_of_a_worker(
    market: SpotMarket, tmp_path: Path
) -> None:
    """Workers have both GPUs and wait for the teacher, so it computes on the CPUs beside them."""
    actors = [ray.remote(Process).options(num_gpus=1).remote() for _ in range(2)]
    ray.get([actor.report.remote() for actor in actors], timeout=PATIENCE_S)
    file = tmp_path / "given"
    try:
        with TeacherService(
            partial(RecordingTeacher, file),
            {"a": 0},
            4,
            2,
            window=2,
            stall_timeout_s=300.0,
            gpus=0.5,
            account=tmp_path / "account.json",
            on_metrics=lambda metrics: None,
        ) as service:
            source = service.source("a", (TEACHER,), None, 0)()
            loaded: list[Any] = []
            thread = threading.Thread(target=lambda: loaded.append(source.load(0, 0)), daemon=True)
            thread.start()
            thread.join(PATIENCE_S)
            assert loaded, "no step came"
        assert file.read_text() == "cpu ''"
    finally:
        for actor in actors:
            ray.kill(actor)


def test_device_cpu_trains_on_cpus_on_a_machine_with_gpus(market: SpotMarket, tmp_path: Path) -> None:
    """The last one on this cluster, since its slots stay warm for a while."""
    trains = job(tmp_path, device="cpu", resources={"labels": {"pool": "fast"}})
    faults = tmp_path / "pretrain-faults"
    Running(replace(trains, task=partial(DeviceTask, faults, 0.0))).finish()
    assert json.loads((faults / "device").read_text()) == ["cpu", "", ""]


# --- without a cluster --------------------------------------------------------------------------------------------


def test_a_process_started_with_some_gpus_uses_those_and_no_others() -> None:
    code = "from orchestrator.training.device import *; print(assigned_gpus(), device(), device('cpu'))"
    for gpus, expected in ((("3", "5"), "('3', '5') cuda:0 cpu"), ((), "() cpu cpu")):
        env = {**os.environ, **device.environment(gpus)}
        assert env["CUDA_VISIBLE_DEVICES"] == ",".join(gpus)
        printed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
        assert printed.stdout.decode().strip() == expected


def test_what_torch_sees_counts_only_where_no_slot_says_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_given_by_ray", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv(device.VARIABLE, raising=False)
    assert device.assigned_gpus() == ("0", "1")
    assert device.device("cpu") == "cpu"
    assert device.device_type() == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert device.assigned_gpus() == ("5", "GPU-7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.assigned_gpus() == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv(device.VARIABLE, "")
    assert device.device() == "cpu"


def test_costs_are_measured_on_cores_where_device_is_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.VARIABLE, "0,1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "H100")
    assert (measured_costs.hardware()["device"], measured_costs.hardware()["devices"]) == ("H100", 2)
    assert (measured_costs.hardware("cpu")["device"], measured_costs.hardware("cpu")["devices"]) == (
        "cpu",
        measured_costs.cores(),
    )


def test_a_process_that_has_initialised_cuda_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    device.assert_forkable()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="has initialised CUDA and must not be forked"):
        device.assert_forkable()


def test_asking_whether_a_process_can_be_forked_imports_no_torch() -> None:
    code = "import sys; from orchestrator.training.device import *; assert_forkable(); print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert printed.stdout.decode().strip() == "False"
