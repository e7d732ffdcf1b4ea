"""One small run of each stage kind, and the numbers of it that are worth keeping.

The stage's own `run` runs, with the real training loop in one worker process; only Ray is left out. Of `distill`, whose
`run` starts a cluster's worth of actors, a student's job and its teacher run as they would there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import inputs
import numpy as np
from pydantic import TypeAdapter
from safetensors.numpy import load_file
from whole_stage import artifact, train

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import DataSource
from orchestrator.data.index import ImageIndex
from orchestrator.elastic import trainer
from orchestrator.stages import AnyStage
from orchestrator.stages.base import Context, Stage
from orchestrator.stages.distill.config import Distill
from orchestrator.tracking.run import NullRun

Numbers = dict[str, float]

# Times, and what says how fast something went.
_TIMES = ("seconds", "goodput")
_TRAIN: dict[str, Any] = {
    "steps": 4, "batch_size": 8, "block_size": 4, "precision": "fp32",
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 2}, "layer_decay": 0.8},
}  # fmt: skip
_SSL = {
    **_TRAIN, "ema": {"peak": 0.8}, "koleo_views": "both", "homogeneous": "photos", "homogeneous_ratio": 0.3,
}  # fmt: skip
_TEXT = {
    "kind": "align_text", "steps": 3, "batch_size": 8, "block_size": 4, "image_size": 32, "precision": "fp32",
    "optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 1}}, "text": {"dim": 16, "depth": 1, "num_heads": 2},
    "num_blocks": 1, "output_dim": 12, "vocab_size": 280,
}  # fmt: skip
_DISTILL = {
    **_TRAIN, "kind": "distill", "steps": 3, "ema": {"peak": 0.8},
    "students": {"small": {"model": "vit_femto", "drop_path": 0.2}, "other": {"model": "convnext_mini"}},
}  # fmt: skip

_TUNE = {
    "kind": "finetune", "steps": 4, "batch_size": 8, "block_size": 4, "image_size": 32, "precision": "fp32",
    "optimizer": {"lr": {"peak": 1e-2, "warmup_steps": 1}, "layer_decay": 0.8}, "validate_every": 2,
    # Waves are like each other.
    "split": {"validation_share": 0.3, "test_share": 0.3, "near_duplicate": 1.0},
}  # fmt: skip

# Name of the case → the stage's section in a pipeline file, and which fixed artifact plays which role.
CASES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "curate": ({"kind": "curate", "data": "photos", "clusters": 3, "sample": 0.5}, {}),
    "pretrain": (
        {**_SSL, "kind": "pretrain", "model": "vit_femto", "drop_path": 0.3, "heads": inputs.HEADS,
         "frozen_prototype_steps": 2, "snapshot_every": 2},
        {"index": "curate"},
    ),
    "gram_anchor": (
        {**_SSL, "kind": "gram_anchor", "gram": {"weight": {"peak": 2.0}, "first_update": 2, "update_every": 1}},
        {"index": "curate", "backbone": "pretrain"},
    ),
    "high_res": (
        {**_SSL, "kind": "high_res", "resolutions": [
            {"global_size": 48, "local_size": 16, "gram_size": 64, "p": 0.5},
            {"global_size": 64, "local_size": 24, "gram_size": 64, "p": 0.5}]},
        {"index": "curate", "backbone": "pretrain"},
    ),
    "distill": (_DISTILL, {"index": "curate", "teacher": "pretrain"}),
    "distill_features": (
        {**_DISTILL, "features": {"whiten": True, "whiten_images": 16, "local_weight": 0.5}},
        {"index": "curate", "teacher": "pretrain"},
    ),
    "align_text": (_TEXT, {"index": "curate", "tower": "distill"}),
    "finetune": (
        {**_TUNE, "mode": "full", "drop_path": 0.3, "ema": {"peak": 0.5},
         "task": {"type": "classification", "label_smoothing": 0.1}},
        {"index": "curate", "backbone": "pretrain"},
    ),
    "finetune_lora": (
        {**_TUNE, "mode": "lora", "lora": {"rank": 4, "targets": ["attention", "mlp"]},
         "task": {"type": "classification", "classes": 3, "pool": "cls"}},
        {"index": "curate", "backbone": "pretrain"},
    ),
    "evaluate": (
        {"kind": "evaluate", "k": 3, "num_groups": 3, "num_pictures": 2},
        {"index": "curate", "pretrain": "pretrain", "students": "distill", "text": "align_text"},
    ),
    "publish": ({"kind": "publish"}, {"students": "distill", "evaluation": "evaluate"}),
}  # fmt: skip


def prepare(folder: Path) -> None:
    """All fixed artifacts, by kind, below `folder`."""
    photos = inputs.photographs(folder / "photos")
    index = inputs.index(folder / "curate", photos)
    inputs.backbone(folder / "pretrain")
    tower = inputs.students(folder / "distill") / "students" / "small" / "model"
    captions = [str(row.caption) for row in ImageIndex.load(index)]
    inputs.text(folder / "align_text", tower, captions, _TEXT)
    inputs.evaluation(folder / "evaluate")


def stage_of(case: str) -> Stage:
    """The config of a case."""
    stage: Stage = TypeAdapter(AnyStage).validate_python(CASES[case][0])
    return stage


def numbers(case: str, folder: Path, scratch: Path) -> Numbers:
    """Run a case in a worker of a process group of one, and say what came out."""
    stage = stage_of(case)
    context = _context(case, folder, scratch)
    trainer.run = train
    if isinstance(stage, Distill):
        found: dict[str, Any] = {}
        for name in stage.students:
            found |= {f"{name}/{key}": value for key, value in _student(stage, context, name).items()}
        return found
    if case == "publish":
        _without_registry()
    returned = stage.run(context)
    found = _plain({f"returned/{name}": value for name, value in returned.items()})
    found |= _records(context.run)
    return found | _READ.get(case, lambda out: {})(context.out) | _weights(context.out)


def _context(case: str, folder: Path, scratch: Path) -> Context:
    (scratch / "out").mkdir(parents=True)
    (scratch / "work").mkdir()
    artifacts = {role: artifact(kind, folder / kind) for role, kind in CASES[case][1].items()}
    return Context(
        name=case,
        pipeline="golden",
        seed=0,
        key="0" * 64,
        inputs=artifacts,
        keys={made.kind: made.key for made in artifacts.values()},
        sources={"photos": DataSource(path=folder / "photos", captions=Path("captions.csv"))},
        out=scratch / "out",
        work=scratch / "work",
        elastic=Elastic(checkpoint_every_s=1e9, device="cpu"),
        run=NullRun(),
        stages=_makers() if case == "publish" else {},
        names={"students": "distill", "evaluation": "evaluate"} if case == "publish" else {},
    )


def _makers() -> dict[str, Stage]:
    """Of the inputs of `publish`; the fixed students are fewer than those of the case."""
    distill = stage_of("distill")
    students = {"small": distill.students["small"]} if isinstance(distill, Distill) else {}
    return {"students": distill.model_copy(update={"students": students}), "evaluation": stage_of("evaluate")}


def _student(stage: Distill, context: Context, name: str) -> Numbers:
    from worker import TaughtBlocks

    from orchestrator.stages.common.config import stage_seed
    from orchestrator.stages.distill.student_runs import student_job
    from orchestrator.stages.distill.teacher_kinds import teaching

    teach = teaching(stage, context, stage_seed(context, stage.kind))
    with context.part("student", stage.student_identity(name)) as part:
        job = student_job(stage, context, teach, name, part)
        teacher = teach.factory([stage.students[name]], stage.steps)
        run = NullRun()
        train(
            replace(job, blocks=lambda: TaughtBlocks(teacher(), job.num_blocks)),
            tracker=run,
            stop=context.stop,
        )
        folder = context.out / name
        folder.mkdir()
        job.collect_finished(folder)
    return _records(run) | _weights(folder)


def _without_registry() -> None:
    from orchestrator.tracking import registry

    registry.publish = lambda *arguments, **named: 1


def _records(run: Any) -> Numbers:
    return _plain(
        {
            f"step {record['step']}/{name}": value
            for record in run.history()
            for name, value in record["metrics"].items()
        }
    )


def _weights(folder: Path) -> Numbers:
    """Of each file of weights: the norms of all weights and of all biases below each name's first part.

    Of weights also which way they point, along a fixed direction: a small move of all hardly changes a norm.
    """
    squares: Numbers = {}
    along: Numbers = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if "checkpoint" in path.parts or "lineage" in path.parts:
            continue
        for name, value in load_file(path).items():
            flat = value.astype(np.float64).ravel()
            key = f"{path.relative_to(folder).as_posix()}/{name.partition('.')[0]}"
            if value.ndim > 1:
                along[key] = along.get(key, 0.0) + float(flat @ np.cos(np.arange(flat.size)))
            key += "/biases" if value.ndim < 2 else "/weights"
            squares[key] = squares.get(key, 0.0) + float(flat @ flat)
    norms = {key: value**0.5 for key, value in squares.items()}
    turns = {f"{key}/direction": value / (norms[f"{key}/weights"] or 1.0) for key, value in along.items()}
    return norms | turns


def _curated(out: Path) -> Numbers:
    index = ImageIndex.load(out)
    report = json.loads((out / "report.json").read_text())
    found = {f"photo {row}/cluster": float(index[row].cluster) for row in range(len(index))}
    found |= {f"photo {row}/balanced": float(index[row].component == "balanced") for row in range(len(index))}
    norms = np.linalg.norm(np.load(out / "embeddings.npy").astype(np.float64), axis=0)
    found |= {f"embedding/{at}": float(value) for at, value in enumerate(norms[:: max(1, len(norms) // 16)])}
    return found | {name: float(report[name]) for name in ("images", "unique", "corrupt", "duplicates")}


def _evaluated(out: Path) -> Numbers:
    return _plain(_flat(json.loads((out / "table.json").read_text())))


def _published(out: Path) -> Numbers:
    """Texts as numbers: which of them there are."""
    entries = json.loads((out.parent / "work" / "published.json").read_text())
    found = {
        f"{name}/{part}": 1.0
        for name, parts in json.loads((out / "models.json").read_text()).items()
        for part in parts
    }
    found |= {f"{entry['name']}@{entry['alias']}": 1.0 for entry in entries}
    return found | {f"{entry['name']}/{tag}": 1.0 for entry in entries for tag in entry["tags"]}


_READ: dict[str, Callable[[Path], Numbers]] = {
    "curate": _curated,
    "evaluate": _evaluated,
    "publish": _published,
}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: found for key, item in items for name, found in _flat(item, f"{prefix}{key}/").items()}
    return {prefix.rstrip("/"): value}


def _plain(values: Mapping[str, Any]) -> Numbers:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not any(word in name for word in _TIMES)
    }
