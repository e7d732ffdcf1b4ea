"""What the photos of a curation are embedded and clustered by: threads of this process, or the Ray cluster."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from orchestrator.data.curation.block_workers import BlockWorkers

logger = logging.getLogger("orchestrator")

Workers = Literal["auto", "threads", "ray"]

# Photos from which on a cluster of one machine is used, since it may grow.
_MANY = 200_000


def block_workers(chosen: Workers, stage: str, count: int) -> BlockWorkers | None:
    """What clusters so many photos; None for threads."""
    processors = ray_processors(chosen, stage, count)
    if processors is None:
        return None
    from orchestrator.data.curation.block_workers import RayWorkers

    return RayWorkers(processors)


def ray_processors(chosen: Workers, stage: str, count: int) -> int | None:
    """How many processors of the Ray cluster work on so many photos; None for threads of this process."""
    ray = sys.modules.get("ray")
    if chosen == "threads" or ray is None or not ray.is_initialized():
        return None
    from orchestrator.elastic.resources import cluster_nodes

    nodes = cluster_nodes()
    if chosen == "auto" and len(nodes) < 2 and count < _MANY:
        return None
    # Ray may believe in more processors than a machine has.
    cores = sum(min(node.resources.get("CPU", 0.0), node.cores) for node in nodes)
    free = int(min(cores, ray.available_resources().get("CPU", 0.0)))
    if free < 1:
        logger.warning("%s: no processor of the Ray cluster is free: threads of this process work", stage)
        return None
    return free
