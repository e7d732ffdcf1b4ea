"""What the slot of one worker asks Ray for, how many such slots a cluster has, and which requests are refused."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.config.elastic import EVERY_DEVICE, Elastic

if TYPE_CHECKING:
    from orchestrator.training.job import Job
from orchestrator.errors import UserError, nearest

_ACCELERATOR = "accelerator_type:"
_CHOICE = re.compile(r"in\((.*)\)")
_EPSILON = 1e-6
_MAX_SHOWN = 6


@dataclass(frozen=True)
class SlotShape:
    """What one slot takes of its node, and which nodes will do. Slots of equal shapes can stand in for each other.

    Attributes:
        cpus: logical CPUs.
        gpus: GPUs; a share below 1 lies on one GPU.
        memory: bytes that Ray counts, or None.
        accelerator_type: that the node must have, or None.
        labels: Ray's label selector, sorted.
        runtime_env: Ray's runtime environment as canonical JSON. It may hold secrets, so no repr shows it.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int | None = None
    accelerator_type: str | None = None
    labels: tuple[tuple[str, str], ...] = ()
    runtime_env: str = field(default="{}", repr=False)

    def ray_options(self) -> dict[str, Any]:
        """Arguments for `ray.remote(…).options(…)`."""
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.memory is not None:
            options["memory"] = self.memory
        if self.accelerator_type is not None:
            options["accelerator_type"] = self.accelerator_type
        if self.labels:
            options["label_selector"] = dict(self.labels)
        if self.runtime_env != "{}":
            options["runtime_env"] = json.loads(self.runtime_env)
        return options

    def train_resources(self) -> dict[str, float]:
        """What one worker takes, as Ray Train's `resources_per_worker` says it."""
        named = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory or 0)}
        if self.accelerator_type is not None:
            # As Ray writes an `accelerator_type` of its own.
            named[f"{_ACCELERATOR}{self.accelerator_type}"] = 0.001
        return {name: value for name, value in named.items() if value}

    def __str__(self) -> str:
        parts = [f"{self.gpus:g} GPU" if self.gpus else "", f"{self.cpus:g} CPU" if self.cpus else ""]
        parts.append(f"{self.memory / 2**30:.3g} GiB of memory" if self.memory else "")
        parts.append(f"accelerator_type {self.accelerator_type}" if self.accelerator_type else "")
        parts += [f"label {name}={value}" for name, value in self.labels]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Node:
    """A living node of the cluster: all that it has, free or not, in Ray's names and units, and its labels.

    Attributes:
        cores: of the machine, where they are known; Ray may believe in more CPUs.
    """

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    cores: float = math.inf

    @property
    def gpus(self) -> float:
        """GPUs that Ray knows of."""
        return self.resources.get("GPU", 0.0)

    @property
    def accelerators(self) -> set[str]:
        """Types of its accelerators, in Ray's words."""
        return {name.removeprefix(_ACCELERATOR) for name in self.resources if name.startswith(_ACCELERATOR)}

    @property
    def takes_work(self) -> bool:
        """Whether a worker can be there at all; a head node often has no room for one."""
        return self.resources.get("CPU", 0.0) > 0 or self.gpus > 0


# --- what a slot is -----------------------------------------------------------------------------------------------


def slot_shape(elastic: Elastic, share: float, cluster_has_gpus: bool) -> SlotShape:
    """The slot of one worker.

    Args:
        elastic: the job's section: `device` and `resources`.
        share: of a GPU, where there are GPUs and `resources.gpu` does not say.
        cluster_has_gpus: whether `device: auto` is a GPU; see :func:`has_gpus`.
    """
    wanted = elastic.resources
    on_gpu = elastic.device == "gpu" or (elastic.device == "auto" and cluster_has_gpus)
    gpus = (share if wanted.gpu is None else wanted.gpu) if on_gpu else 0.0
    cpus = wanted.cpu if wanted.cpu is not None else 0.0 if on_gpu else 1.0
    return SlotShape(
        cpus=float(cpus),
        gpus=float(gpus),
        memory=wanted.memory,
        accelerator_type=wanted.accelerator_type,
        labels=tuple(sorted(wanted.labels.items())),
        runtime_env=json.dumps(wanted.runtime_env, sort_keys=True, separators=(",", ":")),
    )


def has_gpus(elastic: Elastic, nodes: Iterable[Node]) -> bool:
    """Whether one of the nodes that a worker may be on has a GPU."""
    return any(node.gpus > 0 and _selected(elastic, node) for node in nodes)


def slots_on(shape: SlotShape, node: Node) -> int:
    """How many slots of a shape the whole node holds, if nothing else is on it; of GPU shares, one a GPU.

    Of one job only one worker can be on a GPU, since NCCL does not connect two there.
    """
    if not _matches(shape.labels, shape.accelerator_type, node):
        return 0
    gpus = node.gpus // max(1.0, shape.gpus) if shape.gpus else math.inf
    cpus = (node.resources.get("CPU", 0.0) + _EPSILON) // shape.cpus if shape.cpus else math.inf
    memory = node.resources.get("memory", 0.0) // shape.memory if shape.memory else math.inf
    found = min(gpus, cpus, memory)
    return 0 if math.isinf(found) else int(found)


def worker_range(elastic: Elastic, shape: SlotShape, nodes: Iterable[Node]) -> tuple[int, int]:
    """min_workers and max_workers on these nodes: `workers: auto` ends at the devices that they have.

    An own cluster on one machine has more CPUs than the machine has cores, since a teacher and students share
    them. More workers than cores would not train faster.
    """
    min_workers, max_workers = elastic.workers
    if max_workers == EVERY_DEVICE:
        max_workers = max(min_workers, sum(_devices_on(shape, node) for node in nodes))
    return min_workers, max_workers


def _devices_on(shape: SlotShape, node: Node) -> int:
    slots = slots_on(shape, node)
    return slots if shape.gpus else int(min(slots, max(1.0, node.cores / max(1.0, shape.cpus))))


# --- what cannot be -----------------------------------------------------------------------------------------------


def check_resources(
    elastic: Elastic,
    shape: SlotShape,
    nodes: Sequence[Node],
    where: str,
    *,
    growing: bool = False,
    section: str | None = None,
) -> None:
    """Check, before the first step, that the cluster has nodes for what a job asks for.

    A cluster without any node for workers passes: its spot machines may come back. So does a cluster with an
    autoscaler, which may add the nodes.

    Args:
        elastic: the job's section.
        shape: of its slots.
        nodes: of the cluster.
        where: the key path of the section with `workers` and `resources`, for the error.
        growing: whether an autoscaler may add nodes of other kinds.
        section: the key path of the section with `device`; default: `where`.

    Raises:
        UserError: no node of the cluster is suitable; the error lists what the nodes have.
    """
    there = [node for node in nodes if node.takes_work]
    if growing or not there:
        return
    _check_selection(shape, there, where)
    chosen = [node for node in there if _matches(shape.labels, shape.accelerator_type, node)]
    if shape.gpus and not any(node.gpus > 0 for node in chosen):
        which = " with the accelerator and labels of its workers" if len(chosen) < len(there) else ""
        raise UserError(
            f"device is {elastic.device}, and no node of the cluster{which} has a GPU",
            where=f"{section or where}.device",
            hint="set device: cpu, or use nodes with GPUs",
        )
    if not any(slots_on(shape, node) for node in chosen):
        raise UserError(
            f"no node of the cluster is large enough for a worker with {shape}",
            where=f"{where}.resources",
            hint=f"the nodes have: {_counted(_size(node) for node in chosen)}",
        )
    min_workers, gpus = elastic.workers[0], int(sum(node.gpus for node in chosen))
    if 0 < shape.gpus < 1 and min_workers > max(1, gpus):
        raise UserError(
            f"{min_workers} workers on shares of {gpus} GPU{'s' if gpus > 1 else ''}: "
            "two workers of one job cannot be on one GPU",
            where=f"{where}.workers",
            hint=_hint_shared(gpus),
        )


def refuse_shared_gpus(slots: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Check that no two workers of one group are on one GPU: NCCL does not connect two processes there.

    Args:
        slots: of each rank, its node and the ids of its GPUs there; no ids for a worker on a CPU.

    Raises:
        UserError: two workers are on one GPU.
    """
    known: dict[tuple[str, str], int] = {}
    for rank, (node, gpus) in enumerate(slots):
        for gpu in gpus:
            first = known.setdefault((node, gpu), rank)
            if first != rank:
                raise UserError(
                    f"workers {first} and {rank} of one job would be on the same GPU, number {gpu} of node "
                    f"{node[:8]}: NCCL needs a GPU of its own for each worker",
                    where="elastic.resources.gpu",
                    hint=_hint_shared(None),
                )


def _hint_shared(gpus: int | None) -> str:
    fits = f"at most {gpus}" if gpus is not None and gpus > 1 else "1"
    return f"set resources.gpu to 1, so that each worker has a whole GPU, or workers to {fits}"


def _check_selection(shape: SlotShape, nodes: Sequence[Node], where: str) -> None:
    """Check that a node has the accelerator and the labels that the slot asks for."""
    kind = shape.accelerator_type
    kinds = sorted({name for node in nodes for name in node.accelerators})
    if kind is not None and kind not in kinds:
        close = nearest(kind, kinds)
        known = f"there are: {', '.join(kinds)}" if kinds else "leave it out"
        raise UserError(
            f"no node of the cluster has an accelerator of type {kind}",
            where=f"{where}.resources.accelerator_type",
            hint=f"did you mean {close!r}?" if close else known,
        )
    nodes = [node for node in nodes if _matches((), kind, node)]
    if not any(_matches(shape.labels, None, node) for node in nodes):
        wanted = ", ".join(f"{name}={value}" for name, value in shape.labels)
        names = {name for name, _ in shape.labels}
        raise UserError(
            f"no node {f'with {kind} ' if kind else ''}of the cluster has the labels {wanted}",
            where=f"{where}.resources.labels",
            hint=f"the nodes have: {_counted(_shown_labels(node, names) for node in nodes)}",
        )


# --- jobs ---------------------------------------------------------------------------------------------------------


def slot_of(job: Job) -> SlotShape:
    """The slot of a job's worker on the connected cluster; to be asked once, before the first worker.

    Raises:
        UserError: the cluster has no node for it.
    """
    nodes = cluster_nodes()
    shape = slot_shape(job.elastic, 1.0, has_gpus(job.elastic, nodes))
    section = f"stages.{job.name.partition('/')[0]}.elastic"
    where = job.where if "/" in job.name else section
    check_resources(job.elastic, shape, nodes, where, growing=can_grow(), section=section)
    return shape


def workers_of(job: Job, shape: SlotShape) -> tuple[int, int]:
    """min_workers and max_workers of a job just now: by its `limit`, else by `elastic.workers` and the cluster.

    `workers: auto` never asks for more workers than a step has blocks, since they would be idle.
    """
    if job.limit is not None:
        return job.limit()
    if not job.elastic.every_device:
        return job.elastic.workers
    min_workers, max_workers = worker_range(job.elastic, shape, cluster_nodes())
    return min_workers, max(min_workers, min(max_workers, job.num_blocks))


# --- the cluster --------------------------------------------------------------------------------------------------


def cluster_nodes() -> tuple[Node, ...]:
    """The living nodes of the connected cluster, except those that announced their end."""
    import ray

    from orchestrator.elastic.nodes import draining_nodes

    here = None if ray.util.client.ray.is_connected() else ray.get_runtime_context().get_node_id()
    leaving = draining_nodes()
    nodes = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving)
    return tuple(_node(node, is_here=node["NodeID"] == here) for node in nodes)


def can_grow() -> bool:
    """Whether the cluster has an autoscaler that may add nodes of kinds that are not there yet."""
    import ray
    from ray._private.state import state

    if ray.util.client.ray.is_connected():
        return bool(ray.get(ray.remote(num_cpus=0)(can_grow).remote()))
    return state.get_cluster_config() is not None


def _node(info: Mapping[str, Any], *, is_here: bool) -> Node:
    cores = float(os.cpu_count() or 1) if is_here else math.inf
    return Node(info["NodeID"], dict(info["Resources"]), dict(info.get("Labels") or {}), cores)


def _selected(elastic: Elastic, node: Node) -> bool:
    wanted = elastic.resources
    return _matches(tuple(wanted.labels.items()), wanted.accelerator_type, node)


def _matches(labels: Iterable[tuple[str, str]], accelerator: str | None, node: Node) -> bool:
    if accelerator is not None and accelerator not in node.accelerators:
        return False
    return all(_fits(value, node.labels.get(name)) for name, value in labels)


def _fits(selector: str, label: str | None) -> bool:
    """Ray's rule: `value`, `!value`, `in(a,b)` or `!in(a,b)`; a label that is not there equals no value."""
    negated, selector = selector.startswith("!"), selector.removeprefix("!")
    choice = _CHOICE.fullmatch(selector)
    values = [value.strip() for value in choice[1].split(",")] if choice else [selector]
    return (label in values) != negated


def _size(node: Node) -> str:
    memory = node.resources.get("memory", 0.0) / 2**30
    return f"{node.gpus:g} GPU, {node.resources.get('CPU', 0.0):g} CPU, {memory:.3g} GiB"


def _shown_labels(node: Node, names: set[str]) -> str:
    """A node's labels of these names, or, if it has none of them, all that are not Ray's own."""
    shown = {name: value for name, value in node.labels.items() if name in names}
    shown = shown or {name: value for name, value in node.labels.items() if not name.startswith("ray.io/")}
    return " ".join(f"{name}={value}" for name, value in sorted(shown.items())) or "no labels"


def _counted(texts: Iterable[str]) -> str:
    counted = sorted(Counter(texts).items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(f"{number} × {text}" for text, number in counted[:_MAX_SHOWN])
