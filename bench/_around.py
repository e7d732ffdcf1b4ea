"""What `bench/saturation.py` measures here: crops, the coordinator, and what Ray moves between machines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.pipeline.cost.device_split import material
from orchestrator.pipeline.load import LoadedPipeline


def crop_seconds(loaded: LoadedPipeline, stage: str, folder: Path, quick: bool) -> float:
    """Processor seconds of one image: a JPEG of 640 × 480 decoded, and all its crops."""
    import cv2

    from orchestrator.data.crops import make_views
    from orchestrator.data.decode import read_rgb

    crops = material(loaded, stage).stage.crops
    rng = np.random.default_rng(0)
    path = folder / "photo.jpg"
    coarse = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC))
    cv2.setNumThreads(1)
    seconds = []
    for number in range(12 if quick else 60):
        began = time.process_time()
        image = read_rgb(path, crops.min_side)
        make_views(image, crops, lambda view, number=number: np.random.default_rng([number, view]))  # type: ignore[misc]
        seconds.append(time.process_time() - began)
    return float(np.median(seconds))


def ray_figures(quick: bool) -> tuple[float, float]:
    """Calls a second that the coordinator answers, and Gbit a second from one raylet's memory to another's."""
    import ray

    from tools.market import SpotMarket

    with SpotMarket() as market:
        nodes = [market.add(name) for name in ("a", "b")]
        ray.init(address=market.address, log_to_driver=False, logging_level="ERROR")
        try:
            return _coordinator_calls(400 if quick else 4000), _transfer_gbit(nodes, 3 if quick else 9)
        finally:
            ray.shutdown()


def _coordinator_calls(calls: int) -> float:
    import ray

    from orchestrator.teacher_service.coordinator import StepCoordinator, StepRefs
    from orchestrator.teacher_service.counters import TeacherCounters

    coordinator: Any = ray.remote(StepCoordinator).options(num_cpus=0, max_concurrency=1000).remote(
        {"student": 0}, 10, window=4, patience_s=600.0, account=TeacherCounters()
    )  # fmt: skip
    ray.get(coordinator.deliver.remote("teacher", 0, StepRefs({}, {}), 1, 1, 1))
    ray.get([coordinator.step.remote("student", 0) for _ in range(calls // 10)])
    began = time.monotonic()
    ray.get([coordinator.step.remote("student", 0) for _ in range(calls)])
    seconds = time.monotonic() - began
    ray.kill(coordinator)
    return calls / seconds


def _transfer_gbit(nodes: Sequence[str], times: int) -> float:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    size = 64 * 2**20

    def put() -> list[Any]:
        return [ray.put(np.ones(size, np.uint8))]

    def fetch(refs: list[Any]) -> float:
        began = time.monotonic()
        ray.get(refs[0])
        return time.monotonic() - began

    first, second = (On(node, soft=False) for node in nodes)
    seconds = []
    for _ in range(times + 1):
        refs = ray.get(ray.remote(num_cpus=0)(put).options(scheduling_strategy=first).remote())
        fetching = ray.remote(num_cpus=0)(fetch).options(scheduling_strategy=second).remote(refs)
        seconds.append(ray.get(fetching))
    return size * 8 / 1e9 / float(np.median(seconds[1:]))
