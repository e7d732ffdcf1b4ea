"""The model of a fine-tuning is made and scored in a Ray task: the same files and figures, and none by the driver."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.byte_counts import BYTES
from orchestrator.elastic import one_task, ray_connection
from orchestrator.elastic.one_task import Check, run_task
from orchestrator.errors import Stopped, UserError
from orchestrator.stages.finetune.finish import Finished, Finishing
from orchestrator.stages.finetune.pictures import Indexed
from orchestrator.stages.finetune.run import training_job
from orchestrator.stages.finetune.start import StartingBackbone
from orchestrator.training.job import Job

from .finetuning import config, context, exported, labelled


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture
def trained(index: Path, start: StartingBackbone, tmp_path: Path) -> tuple[Job, Finishing]:
    """A job that has been trained, and what is left to do."""
    stage = config(mode="full", image_size=16, split={"near_duplicate": 1.0})
    rows = labelled(stage, index, tmp_path)
    job = training_job(stage, context(index, tmp_path), start, Indexed(index), rows)
    job.export(2).parent.mkdir(parents=True)
    exported(stage, start, job.export(2))
    return job, Finishing(stage, start, rows, index, {}, 2)


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.usefixtures("ray")
def test_a_task_makes_the_model_and_its_figures(trained: tuple[Job, Finishing]) -> None:
    job, finishing = trained
    before = BYTES.metrics()
    there = run_task(job, finishing, threading.Event())
    counted = {name: value - before[name] for name, value in BYTES.metrics().items()}
    made = files(job.finished)
    assert set(made) == {"model/config.json", "model/model.safetensors", "model/head.safetensors"}
    assert {name: value for name, value in counted.items() if name.startswith("driver") and value} == {}
    size = sum(map(len, made.values()))
    assert counted["worker_checkpoint_bytes_written"] == size
    assert size <= counted["worker_checkpoint_bytes_read"] < 3 * size

    elsewhere = replace(job, work=job.work / "again")
    elsewhere.export(2).parent.mkdir(parents=True)
    elsewhere.export(2).write_bytes(job.export(2).read_bytes())
    here = finishing(elsewhere, lambda: None)
    assert files(elsewhere.finished) == made
    assert here.sizes == there.sizes
    assert here.scores.keys() == there.scores.keys() == {"validation", "test"}
    for split, figures in here.scores.items():
        assert there.scores[split] == pytest.approx(figures, rel=1e-5)


@pytest.mark.usefixtures("ray")
def test_a_mistake_and_a_stop_are_told_as_ever(trained: tuple[Job, Finishing], tmp_path: Path) -> None:
    job, finishing = trained
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        run_task(job, finishing, stop)
    damaged = replace(finishing.start, digests={"model.safetensors": "0" * 64})
    with pytest.raises(UserError, match="differs from the sha256") as caught:
        run_task(job, replace(finishing, start=damaged), threading.Event())
    assert caught.value.where == str(finishing.start.folder / "model.safetensors")


@pytest.mark.usefixtures("ray")
def test_a_task_that_is_stopped_ends_and_its_driver_waits_in_short_waits(
    trained: tuple[Job, Finishing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    began, waits, stop, real = tmp_path / "began", [], threading.Event(), ray.wait

    def endless(job: Job, check: Check) -> None:
        began.write_text(str(os.getpid()))
        time.sleep(1000)

    def wait(references: Any, **options: Any) -> Any:
        waits.append(options["timeout"])
        if began.exists() and began.read_text():
            stop.set()
        return real(references, **options)

    monkeypatch.setattr(ray, "wait", wait)
    with pytest.raises(Stopped):
        run_task(trained[0], endless, stop)
    assert max(waits) < ray_connection._STILL_S, (
        "a thread in a longer one may stay there when the cluster is left"
    )
    until = time.monotonic() + 30
    while Path(f"/proc/{began.read_text()}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{began.read_text()}").exists()


def test_without_a_cluster_it_is_done_here(
    trained: tuple[Job, Finishing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    job, finishing = trained
    assert isinstance(run_task(job, finishing, threading.Event()), Finished)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        run_task(job, finishing, stop)


def test_warm_workers_make_room_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.elastic.controller_host import hosts
    from orchestrator.elastic.resources import SlotShape

    asked: list[str] = []

    method = SimpleNamespace(remote=lambda: asked.append("drop_idle"))
    monkeypatch.setattr(hosts, "current", lambda: SimpleNamespace(drop_idle=method))
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 3.0, "GPU": 0.5})
    one_task._make_room(SlotShape(cpus=2.0, gpus=0.5))
    assert asked == []
    one_task._make_room(SlotShape(cpus=0.0, gpus=1.0))
    assert asked == ["drop_idle"]
