"""On which machine the teacher runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.training.device import environment

# Of a process that must not touch the GPUs of its node.
_NO_GPU = tuple(sorted(environment(()).items()))


@dataclass(frozen=True)
class FreeNode:
    """A living node: what it has and what of that is free. `leaving`: it announced its end."""

    node: str
    head: bool
    leaving: bool
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float


@dataclass(frozen=True)
class Placement:
    """A node, and what the teacher takes there: nothing if the node is full.

    Attributes:
        environment: variables of its process, over Ray's.
    """

    node: str
    cpus: float
    gpus: float
    environment: tuple[tuple[str, str], ...] = ()


def choose(machines: Sequence[FreeNode], gpus: float, copies: int = 1) -> Placement | None:
    """Where the teacher goes; None if no machine will do.

    One with room if there is one; else it squeezes in beside the workers: a crowded teacher is slow, but none at
    all is a standstill, with every place taken by those who wait for it. Where workers have all GPUs it runs on CPUs:
    its environment hides the GPUs, since Ray does not hide them from a process that asked for none. The head node
    comes first, as its loss ends the driver anyway. A node that is about to go is better than none.

    Args:
        machines: of the cluster.
        gpus: the share of a GPU that it takes; 0 for a teacher on a CPU.
        copies: how many processes it has, each of which takes as much.
    """

    def has_room(machine: FreeNode) -> bool:
        return machine.free_gpus >= copies * gpus if gpus else machine.free_cpus >= copies

    able = [machine for machine in machines if (machine.gpus if gpus else machine.cpus) > 0]
    if not able:
        return None
    best = max(
        able, key=lambda machine: (not machine.leaving, has_room(machine), machine.head, machine.free_cpus)
    )
    if not has_room(best):
        return Placement(best.node, 0.0, 0.0, _NO_GPU if best.gpus else ())
    # A teacher on a CPU: `device: cpu`, or a cluster that has GPUs elsewhere.
    return Placement(best.node, 0.0 if gpus else 1.0, gpus, _NO_GPU if best.gpus and not gpus else ())


def machines() -> list[FreeNode]:
    """The cluster's living nodes."""
    import ray
    from ray._private.state import state

    from orchestrator.elastic.nodes import draining_nodes

    free = state.available_resources_per_node()
    leaving = draining_nodes()
    return [
        FreeNode(
            node=node["NodeID"],
            head="node:__internal_head__" in node["Resources"],
            leaving=node["NodeID"] in leaving,
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
            free_cpus=free.get(node["NodeID"], {}).get("CPU", 0.0),
            free_gpus=free.get(node["NodeID"], {}).get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def has_process(actor_id: str) -> bool:
    """Whether Ray has found a place for this actor and begun to fill it."""
    from ray._private.state import state

    return bool(state.actor_table(actor_id).get("Pid"))
