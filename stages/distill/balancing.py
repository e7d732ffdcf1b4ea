"""The live split of a `distill` stage: what its parts were measured to cost, and who may have how many workers now."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

from orchestrator.capacity.allocate import StudentCost, with_steps
from orchestrator.capacity.measured_costs import cores
from orchestrator.capacity.rebalance import Balancer, cluster_devices
from orchestrator.stages.distill.profiling import Material, measured

logger = logging.getLogger("orchestrator")


def balancer(
    material: Material, steps_left: Mapping[str, int], bounds: Mapping[str, tuple[int, int | None]]
) -> Balancer:
    """A balancer on the connected cluster; measures first, for about a minute, what is not known of this machine.

    Args:
        material: the stage with its artifacts.
        steps_left: of the students that are still to train.
        bounds: minimum and maximum of workers that a student may have, where its config says so; both the same fix it.

    Raises:
        UserError: a part cannot be run on this machine.
    """
    costs = measured(material, say=logger.info)
    kind: Literal["cpu", "gpu"] = "cpu" if costs.kind == "cpu" else "gpu"
    devices = partial(cluster_devices, kind)
    students = [_bounded(one, bounds) for one in with_steps(costs.students, steps_left)]
    # An own cluster on one machine offers more places than there are cores, and the system shares them out.
    share = kind == "cpu" and devices() <= cores()
    return Balancer(costs.teacher, students, devices, share=share)


def _bounded(student: StudentCost, bounds: Mapping[str, tuple[int, int | None]]) -> StudentCost:
    min_workers, max_workers = bounds.get(student.name, (1, None))
    return replace(student, min_workers=max(min_workers, student.min_workers), max_workers=max_workers)
