"""A registry, models and evaluations of them, for tests of what is published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import DataSource
from orchestrator.models import build, save_pretrained
from orchestrator.stages.base import Context, Stage
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest
from orchestrator.tracking.run import Run

SIZE = 16
K, NUM_PHOTOS = 5, 400
RAW_PIXELS, RANDOM, MAJORITY = 0.43, 0.41, 0.25


class Maker(Stage):
    """A stage of any kind, in a user's package too, that made some models."""

    kind: str
    made: Mapping[str, str]

    def models(self) -> Mapping[str, str]:
        return self.made


def backbone(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    save_pretrained(folder, build("vit_femto").state_dict(), "vit_femto", {"image_size": SIZE})


def artifact(kind: str, key: str, path: Path, inputs: Mapping[str, str], **provenance: Any) -> Artifact:
    parts = {"inputs": dict(inputs), "data": provenance.pop("data", {})}
    summary = provenance.pop("summary", {})
    known = {"parts": parts, **provenance}
    return Artifact(
        key, kind, path, Manifest(kind=kind, key=key, created="", files={}, provenance=known, summary=summary)
    )


def rows(**students: float) -> list[dict[str, Any]]:
    """The k-NN table: baselines, random weights of the students' model at two sizes, a teacher, the students."""

    def row(name: str, family: str, accuracy: float, size: int, student: str | None = None) -> dict[str, Any]:
        model = "" if family == "baseline" else "vit_femto"
        return {
            "name": name, "family": family, "accuracy": accuracy, "model": model, "image_size": size,
            "student": student,
        }  # fmt: skip

    return [
        row("majority group", "baseline", MAJORITY, 0),
        row("raw pixels", "baseline", RAW_PIXELS, 32),
        row("random vit_femto, 96 px", "random weights", 0.99, 96),
        row("random vit_femto, 16 px", "random weights", RANDOM, SIZE),
        row("pretrain, step 12", "backbone", 0.11, SIZE),
        row("pretrain, step 36", "backbone", 0.44, SIZE),
        row("high_res, step 6 (teacher)", "backbone", 0.47, SIZE),
        *(row(f"student {name}", "student", value, SIZE, name) for name, value in students.items()),
    ]


def evaluation(folder: Path, table: Mapping[str, Any], inputs: Mapping[str, str], key: str) -> Artifact:
    folder.mkdir(parents=True)
    (folder / "table.json").write_text(json.dumps(table))
    return artifact("evaluate", key, folder, inputs)


def attempt(
    folder: Path, pipeline: str, run: Run, accuracy: float, seed: int = 0, measured: Mapping[str, float] = {}
) -> Context:
    """What a stage gets that publishes one student, `vit`, with this k-NN accuracy; of another seed another student."""
    place = folder / f"{pipeline}-{seed}-{accuracy}-{len(list(folder.iterdir()))}"
    backbone(place / "students" / "vit" / "model", seed)
    (place / "out").mkdir()
    table: dict[str, Any] = {"knn": {"k": K, "num_photos": NUM_PHOTOS, "rows": rows(vit=accuracy)}}
    if measured:
        table["metrics"] = {"rank": {"student vit": dict(measured), "random vit_femto, 16 px": {"rank": 3.0}}}
    key = f"{seed:064d}"
    return context(
        place,
        pipeline,
        run,
        {"students": artifact("distill", key, place, {"index": "c" * 64})},
        {"students": Maker(kind="distill", made={"vit": "students/vit/model"})},
        evaluation(place / "evaluation", table, {"students": key}, f"{hash((seed, accuracy)) % 10**9:064d}"),
    )


def context(
    place: Path,
    pipeline: str,
    run: Run,
    inputs: Mapping[str, Artifact],
    stages: Mapping[str, Stage],
    evaluated: Artifact | None = None,
    sources: Mapping[str, DataSource] = {},
    ancestors: Mapping[str, Artifact] = {},
) -> Context:
    also = {} if evaluated is None else {"evaluation": evaluated}
    names = {role: role.partition(".")[2] or stages[role].kind for role in inputs}
    there = {names[role]: one for role, one in inputs.items()} | {one.kind: one for one in also.values()}
    return Context(
        name="publish",
        pipeline=pipeline,
        seed=0,
        key="k",
        inputs={**inputs, **also},
        keys={name: one.key for name, one in there.items()},
        sources=sources,
        out=place / "out",
        work=place / "work",
        elastic=Elastic(),
        run=run,
        stages=stages,
        names=names | {role: one.kind for role, one in also.items()},
        ancestors={**there, **ancestors},
    )


def content(uri: str, name: str) -> dict[str, Any]:
    """All that the registry has of a model: its tags, its aliases, and the tags of its versions."""
    client = MlflowClient(uri, uri)
    model = client.get_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    return {
        "tags": dict(model.tags),
        "aliases": {alias: int(version) for alias, version in model.aliases.items()},
        "versions": {int(one.version): dict(one.tags) for one in versions},
    }
