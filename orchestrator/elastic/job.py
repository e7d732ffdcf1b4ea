"""One elastic Ray Train job: workers come and go, the training loop goes on from its newest checkpoint."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.elastic.checkpoint import COMMIT
from orchestrator.elastic.control import Control, WorkerControl
from orchestrator.elastic.loop import Job, train
from orchestrator.errors import Stopped, UserError
from orchestrator.tracking.runs import Run

logger = logging.getLogger("orchestrator")

_POLL_S = 0.5
_LINE_EVERY_S = 10.0
# The first hands out Ray Data shards; the second removes what a killed controller leaves on a shared cluster,
# and the pipeline's own cluster ends with its driver.
_UNUSED_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback")


def run(
    job: Job, *, tracker: Run, stop: threading.Event, on_line: Callable[[str], None] = logger.info
) -> None:
    """Train `job` on the connected cluster until its last step is done.

    Args:
        job: what to train.
        tracker: the run that gets its metrics.
        stop: when set, the job checkpoints and ends.
        on_line: gets a progress line every few seconds.

    Raises:
        Stopped: `stop` was set and the job is checkpointed.
        UserError: a mistake found inside a worker.
        RuntimeError: the job failed; the worker's exception is the cause.
    """
    import ray

    if is_done(job):
        return
    actor = ray.remote(Control).options(num_cpus=0).remote(tracker)
    ended: list[BaseException | None] = []

    def fit() -> None:
        try:
            _trainer(job, actor).fit()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=fit, name=f"fit-{job.name}", daemon=True)
    thread.start()
    _watch(thread, actor, job, stop, on_line)
    _settle(ended[0], job, ray.get(actor.outcome.remote()))
    ray.kill(actor)


def _watch(
    thread: threading.Thread, actor: Any, job: Job, stop: threading.Event, on_line: Callable[[str], None]
) -> None:
    import ray

    told, asked = time.monotonic(), False
    while thread.is_alive():
        thread.join(_POLL_S)
        if stop.is_set() and not asked:
            asked = True
            actor.stop.remote()
        if time.monotonic() - told >= _LINE_EVERY_S:
            told = time.monotonic()
            newest = ray.get(actor.progress.remote())
            if newest is not None:
                on_line(_line(job, *newest))


def _line(job: Job, step: int, figures: dict[str, float]) -> str:
    left = (job.num_steps - step) * figures["step_seconds"]
    return (
        f"{job.name}: step {step}/{job.num_steps}, loss {figures['loss']:.3f}, "
        f"{figures['step_seconds']:.2f} s a step, about {left:.0f} s to go"
    )


def _settle(error: BaseException | None, job: Job, complete: bool | None) -> None:
    if error is None and complete:
        return
    if error is None and complete is False:
        raise Stopped(f"{job.name} is checkpointed")
    if error is None:
        raise RuntimeError(f"{job.name} ended without saying how")
    cause = _root_cause(error)
    if isinstance(cause, UserError):
        raise cause
    logger.error("%s failed in a worker:\n%s", job.name, error)
    raise RuntimeError(f"{job.name} failed: {type(cause).__name__}: {cause}") from cause


def _root_cause(error: BaseException) -> BaseException:
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = failures[min(failures)]
    while True:
        inner = getattr(error, "cause", None) or getattr(error, "_base_exc", None) or error.__cause__
        if not isinstance(inner, BaseException):
            return error
        error = inner


def _trainer(job: Job, actor: Any) -> Any:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]
        """Without the helpers that only Ray Data needs; each is a process of 2 CPU seconds and a second's wait."""

        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in _UNUSED_CALLBACKS]

    fewest, most = job.elastic.workers
    use_gpu = ray.cluster_resources().get("GPU", 0) > 0
    ray_folder = job.work / "ray"
    ray_folder.mkdir(parents=True, exist_ok=True)
    return Trainer(
        worker_main,
        train_loop_config={"job": job, "actor": actor},
        scaling_config=ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu=use_gpu,
            resources_per_worker={"GPU": job.gpus_per_worker} if use_gpu else {"CPU": 1},
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            # A fresh name an attempt: Ray Train resumes runs by name, and our checkpoints are our own.
            name=f"{job.name.replace('/', '-')}-{os.getpid()}-{time.time_ns()}",
            storage_path=str(ray_folder.absolute()),
            failure_config=FailureConfig(max_failures=job.elastic.max_failures),
            worker_runtime_env={"env_vars": _worker_env(use_gpu)},
        ),
    )


def _worker_env(use_gpu: bool) -> dict[str, str]:
    if use_gpu:
        return {"TOKENIZERS_PARALLELISM": "false"}
    # One thread a worker: more workers, not more threads, is how a step gets faster, and results do not
    # depend on how many cores the machine has.
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def worker_main(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import torch
    import torch.distributed as dist

    from orchestrator.elastic.zero import import_deepspeed

    deepspeed = import_deepspeed()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    deepspeed.init_distributed(dist.get_backend(), dist_init_required=False, verbose=False)
    control = WorkerControl(config["actor"])
    job: Job = config["job"]
    complete = train(job, control)
    if dist.get_rank() == 0:
        import ray

        control.flush()
        ray.get(config["actor"].finished.remote(complete))


def is_done(job: Job) -> bool:
    """Whether an earlier attempt finished the job: its last checkpoint and export are there."""
    return (final_checkpoint(job) / COMMIT).exists() and job.export(job.num_steps).exists()


def final_checkpoint(job: Job) -> Path:
    """The checkpoint after the job's last step."""
    return job.checkpoints / f"step-{job.num_steps:08d}"
