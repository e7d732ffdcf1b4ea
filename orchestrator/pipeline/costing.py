"""What a pipeline will cost on stated machines: parameters, operations, memory and hours, from the file alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.pipeline import fit, graph
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.spec import Hardware
from orchestrator.stages.base import TrainStage
from orchestrator.stages.workload import Net, Workload, workloads

_GIB = 2**30
# Bytes a parameter, of what ZeRO-3 cuts into shards: bf16 weights, fp32 gradients, master and both moments.
_TRAINED = {"weights": 2, "gradients": 4, "optimiser": 12}
# The fp32 average, and the bf16 copy that computes with it.
_EMA = {"EMA": 4, "frozen weights": 2}
_FROZEN = {"frozen weights": 2}
# A student's logit is held in bf16, again in fp32 for its softmax, and its gradient in bf16; a teacher's in bf16 and
# as an fp32 target.
_STUDENT_LOGIT_BYTES, _TEACHER_LOGIT_BYTES = 8, 6
# Of the tensors that a block's backward needs, per token and channel: in bf16, with attention that does not keep
# its scores; 18 of norms, queries, keys, values and sums, and 4 for each channel of the hidden layer over `dim`.
_BLOCK_BYTES, _HIDDEN_BYTES = 18.0, 4.0


@dataclass(frozen=True)
class Costing:
    """One job on stated machines.

    Attributes:
        hours: of all devices together, at the stated share of the peak.
        memory_gib: on each device, by part.
    """

    work: Workload
    devices: int
    hours: float
    memory_gib: dict[str, float]

    @property
    def days(self) -> float:
        """On the clock, with all devices at it."""
        return self.hours / self.devices / 24


def costings(loaded: LoadedPipeline, hardware: Hardware) -> Iterator[Costing]:
    """Every training job of a pipeline, in running order."""
    roles = graph.roles(loaded)
    fit.check(loaded, roles)
    for name in graph.order(loaded):
        stage = loaded.spec.stages[name]
        upstream = {role: loaded.spec.stages[need] for role, need in roles[name].items()}
        origin = graph.origin(roles, name)
        if origin is not None:
            upstream["origin"] = loaded.spec.stages[origin]
        for work in workloads(stage, name, upstream):
            recompute = isinstance(stage, TrainStage) and stage.activation_checkpointing
            yield costing(
                work, hardware, checkpointing=recompute, chunk_rows=getattr(stage, "chunk_rows", None)
            )


def costing(
    work: Workload, hardware: Hardware, *, checkpointing: bool = False, chunk_rows: int | None = None
) -> Costing:
    """One job by itself on all devices.

    Args:
        work: the job.
        hardware: the machines.
        checkpointing: whether blocks are computed again in the backward pass instead of kept.
        chunk_rows: rows of logits that are held at once; None is all.
    """
    per_device = -(-work.batch_size // hardware.devices)
    memory: dict[str, float] = {}

    def add(part: str, num_bytes: float) -> None:
        if num_bytes:
            memory[part] = memory.get(part, 0.0) + num_bytes / _GIB

    for net in work.nets:
        for part, num_bytes in {"trained": _TRAINED, "ema": _EMA, "frozen": _FROZEN}[net.kept].items():
            add(part, num_bytes * net.params / hardware.devices)
        add("activations", min(work.block_size, per_device) * _activations(net, checkpointing))
    # Two units of bf16 weights, one computed and one on its way, and the gradient of one before it is cut.
    unit = max(net.unit for net in work.nets)
    trains = any(net.kept == "trained" for net in work.nets)
    add("gathered", unit * (2 * 2 + (4 if trains else 0)))
    # A block goes backward before the next goes forward; targets are there for all of a worker's blocks.
    student, teacher = (images * logits for images, logits in
                        zip((min(work.block_size, per_device), per_device), work.logits, strict=True))  # fmt: skip
    if chunk_rows is not None:
        student = min(student, chunk_rows * work.largest_row)
        teacher = min(teacher, chunk_rows * work.largest_row)
    add("logits", _STUDENT_LOGIT_BYTES * student + _TEACHER_LOGIT_BYTES * teacher)
    flops_per_hour = hardware.peak_tflops * 1e12 * hardware.mfu * 3600
    return Costing(work, hardware.devices, work.total_flops / flops_per_hour, memory)


def _activations(net: Net, checkpointing: bool) -> float:
    """Bytes of one image's activations that wait for the backward pass."""
    if net.kept != "trained" or not net.depth:
        return 0.0
    per_block = net.tokens * net.dim * (_BLOCK_BYTES + _HIDDEN_BYTES * net.width)
    if not checkpointing:
        return net.depth * per_block
    return net.depth * net.tokens * net.dim * 2 + per_block
