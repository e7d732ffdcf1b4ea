"""What a pipeline's stages will take of disk and memory, from its file alone, and what this machine has of it.

The figures are estimates on the safe side: each network counts with its heads, every export with all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.elastic import EVERY_DEVICE
from orchestrator.config.schema import Hardware
from orchestrator.disk import space
from orchestrator.errors import UserError
from orchestrator.pipeline import dag
from orchestrator.pipeline.cost.costing import costing, zero_stage
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan.stage_plan import StagePlan
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.shell_command import command
from orchestrator.stages.base import Stage, TrainStage
from orchestrator.stages.common.workload import Workload
from orchestrator.stages.compute_cost import workloads
from orchestrator.stages.distill.config import Distill
from orchestrator.storage.artifacts import folder_name
from orchestrator.storage.cache_folder import cache_folder
from orchestrator.storage.open import is_remote
from orchestrator.units import size

# Bytes a parameter of a checkpoint: fp32 weights and both moments; an EMA, and a Gram teacher, in fp32.
_CHECKPOINT = {"trained": 12, "ema": 4, "frozen": 0}
_GRAM_TEACHER = 4
# An export is in fp32.
_EXPORT = 4
_TIGHT = 0.8
_GIB = 2**30
# A worker, or a teacher, with torch and DeepSpeed imported and nothing loaded.
_PROCESS_BYTES = 0.7 * _GIB
_SHARED = Path("/dev/shm")


@dataclass(frozen=True)
class Need:
    """What one stage takes.

    Attributes:
        artifact: bytes in the store that stay.
        work: bytes in the store, or in its cache on this machine, while it runs.
        memory: bytes of all its processes together, if they run on CPUs.
        shared: bytes of the object store that are held at once.
    """

    stage: str
    artifact: float = 0.0
    work: float = 0.0
    memory: float = 0.0
    shared: float = 0.0


def needs(loaded: LoadedPipeline, names: Sequence[str]) -> list[Need]:
    """What each of these training stages takes. The graph has been checked."""
    roles = dag.roles(loaded)
    stages = loaded.spec.stages
    found = []
    for name in names:
        stage = stages[name]
        if not isinstance(stage, TrainStage):
            continue
        upstream = {role: stages[need] for role, need in roles[name].items()}
        if (origin := dag.origin(roles, name)) is not None:
            upstream["origin"] = stages[origin]
        works = workloads(stage, name, upstream)
        found.append(_need(loaded, name, stage, works, upstream.get("origin")))
    return found


def _need(
    loaded: LoadedPipeline, name: str, stage: TrainStage, works: Sequence[Workload], origin: Stage | None
) -> Need:
    elastic = loaded.spec.elastic.overlaid(stage.elastic)
    artifact, work, memory = stage.kept_bytes(origin), 0.0, 0.0
    for one in works:
        checkpoint = sum(_CHECKPOINT[net.kept] * net.params for net in one.nets)
        checkpoint += sum(_GRAM_TEACHER * net.params for net in one.nets if net.name == "Gram teacher")
        exports = stage.num_exports() * _EXPORT * _exported(one)
        copies = elastic.keep_checkpoints + 1  # one is written before the oldest goes
        copies += one.steps // elastic.keep_every if elastic.keep_every else 0
        artifact += checkpoint + exports
        work += copies * checkpoint + exports
        memory += _memory(stage, one, _most_workers(stage, one, elastic.workers))
    return Need(name, artifact, work, memory, stage.held_bytes())


def _exported(work: Workload) -> int:
    """Parameters of a job's result: the EMA's, or where there is none all that works together."""
    averaged = [net.params for net in work.nets if net.kept == "ema"]
    trains = any(net.kept == "trained" for net in work.nets)
    return max(averaged) if averaged else sum(net.params for net in work.nets) if trains else 0


def _most_workers(stage: TrainStage, work: Workload, workers: tuple[int, int]) -> int:
    """A block is never divided, so there are no more workers than blocks; as many as there are cores, if any number."""
    part = work.name.partition("/")[2]
    if isinstance(stage, Distill) and part == "teacher":
        return stage.num_teachers * stage.teacher_shards
    if isinstance(stage, Distill) and part in stage.students:
        workers = stage.students[part].workers or workers
    most = workers[1] if workers[1] != EVERY_DEVICE else max(workers[0], os.cpu_count() or 1)
    return max(1, min(most, work.batch_size // work.block_size))


def _memory(stage: TrainStage, work: Workload, max_workers: int) -> float:
    """Of all workers of a job on one machine: what is cut into shards is there once."""
    hardware = Hardware(devices=max_workers)
    chunk_rows = getattr(stage, "chunk_rows", None)
    one = costing(
        work,
        hardware,
        checkpointing=stage.activation_checkpointing,
        chunk_rows=chunk_rows,
        zero_stage=zero_stage(stage, work),
    )
    # On a CPU weights are in fp32: twice the bf16 that is counted for devices.
    doubled = ("weights", "frozen weights", "gathered", "activations")
    each = sum(gib * (2 if part in doubled else 1) for part, gib in one.memory_gib.items()) * _GIB
    return max_workers * (each + _PROCESS_BYTES)


# --- what there is ----------------------------------------------------------------------------------------------


def disk(
    loaded: LoadedPipeline, found: Sequence[Need], there: int = 0
) -> tuple[list[UserError], list[UserError]]:
    """Mistakes and warnings: whether what is to be made fits on the disk.

    It is a mistake where not even the artifacts do. Where the largest work beside them does not, or only just, it is a
    warning: the figures are on the safe side. With a store in S3 its room is its owner's to know; what is in the making
    has to fit on this machine's disk.

    Args:
        loaded: the pipeline.
        found: what stages take.
        there: bytes of it that are on the disk already, from an earlier attempt.
    """
    if not found:
        return [], []
    remote = is_remote(loaded.spec.store)
    # Artifacts go to S3 one by one, but their copies stay in the cache for the stages that read them.
    kept = sum(need.artifact for need in found) - there
    needed = kept + max(need.work for need in found)
    folder = cache_folder() if remote else Path(loaded.spec.store.removeprefix("file://")).expanduser()
    free = _free_disk(folder)
    if needed <= _TIGHT * free:
        return [], []
    is_mistake = kept > free
    place = "the cache of the store on this machine" if remote else "the store"
    if is_mistake:
        takes, largest = f"leave about {size(kept)} more on", max(found, key=lambda need: need.artifact)
    else:
        takes, largest = (
            f"take about {size(needed)} more of",
            max(found, key=lambda need: need.artifact + need.work),
        )
    what = f"the stages to run {takes} the disk, most of it {largest.stage}, and {place} {folder} has {size(free)} free"
    collect = command("gc", str(loaded.path))
    hint = f"free some of it (`{collect}` lists what no pipeline needs), set fewer "
    hint += "elastic.keep_checkpoints or snapshots, or use " + (
        "another ORCHESTRATOR_CACHE" if remote else "another store"
    )
    error = UserError(what, where=loaded.where("store"), hint=hint)
    return ([error], []) if is_mistake else ([], [error])


def begun(workspace: Workspace, plans: Sequence[StagePlan]) -> int:
    """Bytes on this machine's disk that unfinished stages have left: their work, and pieces that are done.

    What is there and is made anew does not count: it goes when the new is there.
    """
    if not workspace.exists():
        return 0
    places = set()
    for item in plans:
        own = folder_name(item.kind, item.stage.key)
        names = {own, *(folder_name(*piece) for piece in workspace.pieces(own).values())}
        tops = ("work",) if item.anew else ("work", "artifacts")
        places |= {workspace.root / top / name for name in names for top in tops}
    return sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())


def memory(
    loaded: LoadedPipeline, found: Sequence[Need], has: float, shared: float, machines: str
) -> Iterator[UserError]:
    """Warnings: stages that take more memory, or hold more in the object store, than there is.

    Args:
        loaded: the pipeline.
        found: what stages take.
        has: bytes of memory that are free, or that Ray counts.
        shared: bytes of the object store.
        machines: in words.
    """
    for need in found:
        if need.memory > has:
            yield UserError(
                f"stage {need.stage!r} takes about {size(need.memory)} of memory on CPUs, and {machines} has "
                f"{size(has)}",
                where=loaded.where("stages", need.stage),
                hint="set fewer elastic.workers, a smaller block_size, chunk_rows, or activation_checkpointing: true",
            )
        if need.shared > shared:
            yield UserError(
                f"stage {need.stage!r} holds about {size(need.shared)} of views at once, and Ray's object store of "
                f"{machines} has {size(shared)}: the rest spills to disk, which is slow",
                where=loaded.where("stages", need.stage),
                hint="give more shared memory (docker run --shm-size=8g), set a smaller window, or views: regenerated",
            )


def here(loaded: LoadedPipeline, found: Sequence[Need]) -> Iterator[UserError]:
    """Warnings about this machine, for a pipeline whose cluster is its own."""
    from orchestrator.elastic.cluster import most_object_store

    free = _free_disk(_SHARED) if _SHARED.is_dir() else 0
    # On GPUs the networks are in their memory, which `plan` looks at if there is a `hardware` section.
    on_gpu = [need.stage for need in found if _may_use_gpu(loaded, loaded.spec.stages[need.stage])]
    counted = [Need(need.stage, shared=need.shared) if need.stage in on_gpu else need for need in found]
    yield from memory(loaded, counted, _free_memory(), min(free, most_object_store()), "this machine")


def _may_use_gpu(loaded: LoadedPipeline, stage: Stage) -> bool:
    elastic = loaded.spec.elastic.overlaid(getattr(stage, "elastic", None))
    return elastic.device != "cpu" and (elastic.device == "gpu" or any(Path("/dev").glob("nvidia[0-9]*")))


def of_cluster(
    loaded: LoadedPipeline, found: Sequence[Need], resources: Mapping[str, float]
) -> Iterator[UserError]:
    """Warnings about a cluster that was joined.

    Args:
        loaded: the pipeline.
        found: what stages take.
        resources: what `ray.cluster_resources()` says.
    """
    has_gpus = resources.get("GPU", 0) > 0
    counted = [Need(need.stage, shared=need.shared) if has_gpus else need for need in found]
    has, shared = resources.get("memory", 0), resources.get("object_store_memory", 0)
    yield from memory(loaded, counted, has, shared, "the cluster")


def _free_disk(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return space(folder.absolute())[0]


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
