"""What a pipeline will cost on stated machines: parameters, operations, memory and hours, from the file alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from orchestrator.config.schema import Hardware
from orchestrator.config.zero_stage import ZeroStage, chosen_stage
from orchestrator.pipeline import dag
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan import crop_checks
from orchestrator.stages.base import Stage, TrainStage
from orchestrator.stages.common.workload import Net, Workload
from orchestrator.stages.compute_cost import workloads
from orchestrator.training.job import REDUCE_BUCKET

_GIB = 2**30
# Bytes a parameter: bf16 weights, fp32 gradients, master and both moments.
_TRAINED = {"weights": 2, "gradients": 4, "optimizer": 12}
# Replicated, a block's bf16 gradient is apart from the fp32 sum.
_REPLICATED = {**_TRAINED, "gradients": 6}
# The fp32 average, and the bf16 copy that computes with it.
_EMA = {"EMA": 4, "frozen weights": 2}
_FROZEN = {"frozen weights": 2}
# A student's logit is held in bf16, again in fp32 for its softmax, and its gradient in bf16; a teacher's in bf16 and
# as an fp32 target.
_STUDENT_LOGIT_BYTES, _TEACHER_LOGIT_BYTES = 8, 6
# Of the tensors that a block's backward needs, per token and channel: in bf16, with attention that does not keep
# its scores; 18 of norms, queries, keys, values and sums, and 4 for each channel of the hidden layer over `dim`.
_BLOCK_BYTES, _HIDDEN_BYTES = 18.0, 4.0
# What each ZeRO stage cuts into shards; the rest is whole on every device. In bf16, 1 is 2 (see `zero_config`).
_SHARDED: Mapping[int, frozenset[str]] = {
    0: frozenset(),
    2: frozenset({"optimizer", "EMA", "gradients"}),
    3: frozenset({"optimizer", "EMA", "gradients", "weights", "frozen weights"}),
}
# Bytes a parameter that is moved. bf16 weights are gathered, and fp32 gradients summed to where they are needed; a sum
# that everybody gets is as much again.
_WEIGHTS, _GRADIENTS, _AVERAGE = 2, 4, 4


@dataclass(frozen=True)
class Costing:
    """One job on stated machines.

    Attributes:
        hours: of all devices together, at the stated share of the peak, computing alone.
        memory_gib: on each device, by part.
        zero_stage: what `auto` stands for, too.
        step_s: seconds of a step by cause: computing, and what else the hardware says the speed of.
    """

    work: Workload
    devices: int
    hours: float
    memory_gib: dict[str, float]
    zero_stage: int
    step_s: dict[str, float]

    @property
    def days(self) -> float:
        """On the clock, with all devices at it."""
        return self.hours / self.devices / 24

    @property
    def hours_overlapped(self) -> float:
        """As `hours`, if whatever is shorter hides behind the longest cause."""
        return max(self.step_s.values()) * self.work.steps * self.devices / 3600

    @property
    def hours_apart(self) -> float:
        """As `hours`, if nothing hides behind anything."""
        return sum(self.step_s.values()) * self.work.steps * self.devices / 3600


def costings(loaded: LoadedPipeline, hardware: Hardware) -> Iterator[Costing]:
    """Every training job of a pipeline, in running order."""
    roles = dag.roles(loaded)
    crop_checks.check(loaded, roles)
    for name in dag.order(loaded):
        stage = loaded.spec.stages[name]
        upstream = {role: loaded.spec.stages[need] for role, need in roles[name].items()}
        origin = dag.origin(roles, name)
        if origin is not None:
            upstream["origin"] = loaded.spec.stages[origin]
        for work in workloads(stage, name, upstream):
            recompute = isinstance(stage, TrainStage) and stage.activation_checkpointing
            yield costing(
                work,
                hardware,
                checkpointing=recompute,
                chunk_rows=getattr(stage, "chunk_rows", None),
                zero_stage=zero_stage(stage, work),
            )


def zero_stage(stage: Stage, work: Workload) -> ZeroStage:
    """How a job's weights are spread: a student says so itself, and a shared teacher is always sharded."""
    part = work.name.partition("/")[2]
    if part == "teacher":
        return 3
    settings = getattr(stage, "students", {}).get(part, stage)
    wanted: ZeroStage = getattr(settings, "zero_stage", 3)
    return wanted


def costing(
    work: Workload,
    hardware: Hardware,
    *,
    checkpointing: bool = False,
    chunk_rows: int | None = None,
    zero_stage: ZeroStage = 3,
) -> Costing:
    """One job by itself on all devices.

    Args:
        work: the job.
        hardware: the machines.
        checkpointing: whether blocks are computed again in the backward pass instead of kept.
        chunk_rows: rows of logits that are held at once; None is all.
        zero_stage: how weights are spread over the devices.
    """
    params = {
        kept: sum(net.params for net in work.nets if net.kept == kept)
        for kept in ("trained", "ema", "frozen")
    }
    zero = chosen_stage(zero_stage, *params.values())
    zero = 2 if zero == 1 else zero
    per_device = -(-work.batch_size // hardware.devices)
    memory: dict[str, float] = {}

    def add(part: str, num_bytes: float) -> None:
        if num_bytes:
            memory[part] = memory.get(part, 0.0) + num_bytes / _GIB

    trained = _TRAINED if zero else _REPLICATED
    for net in work.nets:
        for part, num_bytes in {"trained": trained, "ema": _EMA, "frozen": _FROZEN}[net.kept].items():
            add(part, num_bytes * net.params / (hardware.devices if part in _SHARDED[zero] else 1))
        add("activations", min(work.block_size, per_device) * _activations(net, checkpointing))
    if zero:
        add("reduce bucket", 4 * min(REDUCE_BUCKET, params["trained"]))
    if zero == 3:
        # Two units of bf16 weights, one computed and one on its way, and the gradient of one before it is cut.
        unit = max(net.unit for net in work.nets)
        add("gathered", unit * (2 * 2 + (4 if params["trained"] else 0)))
    # A block goes backward before the next goes forward; targets are there for all of a worker's blocks.
    student, teacher = (images * logits for images, logits in
                        zip((min(work.block_size, per_device), per_device), work.logits, strict=True))  # fmt: skip
    if chunk_rows is not None:
        student = min(student, chunk_rows * work.largest_row)
        teacher = min(teacher, chunk_rows * work.largest_row)
    add("logits", _STUDENT_LOGIT_BYTES * student + _TEACHER_LOGIT_BYTES * teacher)
    flops_per_hour = hardware.peak_tflops * 1e12 * hardware.mfu * 3600
    hours = work.total_flops / flops_per_hour
    return Costing(work, hardware.devices, hours, memory, zero, _step_s(work, hardware, hours, zero))


def _step_s(work: Workload, hardware: Hardware, hours: float, zero: int) -> dict[str, float]:
    per_device = -(-work.batch_size // hardware.devices)
    found = {"computing": hours * 3600 / hardware.devices / work.steps}
    if hardware.collective_gb_s is not None:
        blocks = -(-per_device // work.block_size)
        bytes_moved = sum(_traffic(net, zero, blocks if _computes(net, work) else 0) for net in work.nets)
        found["weights and gradients"] = bytes_moved / (hardware.collective_gb_s * 1e9)
    # Students get their views from the teacher.
    if hardware.input_images_s is not None and work.name.partition("/")[2] in ("", "teacher"):
        found["input"] = per_device / hardware.input_images_s
    return found


def _traffic(net: Net, zero: int, blocks: int) -> int:
    """Bytes of a network that a device exchanges in a step, in which it computes so many blocks."""
    by_stage = {
        "trained": {
            0: 2 * _GRADIENTS,
            2: _GRADIENTS * blocks + _WEIGHTS,
            3: (2 * _WEIGHTS + _GRADIENTS) * blocks,
        },
        # ZeRO-2's average is in fp32 shards, and is gathered where it computes with whole weights.
        "ema": {0: 0, 2: _AVERAGE, 3: _WEIGHTS * blocks},
        "frozen": {0: 0, 2: 0, 3: _WEIGHTS * blocks},
    }
    return by_stage[net.kept][zero] * net.params


def _computes(net: Net, work: Workload) -> bool:
    """Whether the network runs in a step; a student's EMA does not."""
    return any(part == net.name or part.startswith(f"{net.name} ") for part in work.flops)


def _activations(net: Net, checkpointing: bool) -> float:
    """Bytes of one image's activations that wait for the backward pass."""
    if net.activation_bytes is not None:
        return net.activation_bytes
    if net.kept != "trained" or not net.depth:
        return 0.0
    per_block = net.tokens * net.dim * (_BLOCK_BYTES + _HIDDEN_BYTES * net.width)
    if not checkpointing:
        return net.depth * per_block
    return net.depth * net.tokens * net.dim * 2 + per_block
