"""A process that evaluates made pictures by itself, or on a Ray cluster of its own, for `bench.evaluate_memory`.

python -m bench._evaluate_pictures PICTURES COUNT OUT WORKERS
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from ray import init, shutdown

from orchestrator.config.elastic import Elastic
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.models import build, save_pretrained
from orchestrator.stages.base import Context
from orchestrator.stages.evaluate.config import Evaluate
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest
from orchestrator.tracking.run import NullRun

MODEL, SIDE, LABELS = "vit_femto", 32, 10
# What workers share is small.
_OBJECT_STORE = 128 * 2**20
# The shares of validation and test are small and L-BFGS is short, as they change times and no memory. Near duplicates
# are looked for; of noise there are none this near.
_STAGE = {
    "kind": "evaluate",
    "k": 5,
    "metrics": [
        {"use": "knn", "k": [5, 20]},
        {"use": "linear_probe", "decay": [0.01, 0.1], "max_iterations": 20},
    ],
    "split": {"by": "hash", "validation_share": 0.005, "test_share": 0.005, "near_duplicate": 1.0},
    "num_pictures": 2,
}


def name_of(number: int) -> str:
    """Where a made picture is below the folder of all: a thousand in a folder."""
    return f"{number // 1000:03}/{number:06}.png"


def model(folder: Path) -> None:
    """A model folder with random weights."""
    torch.manual_seed(0)
    save_pretrained(folder, build(MODEL).state_dict(), MODEL, {"image_size": SIDE})


def _index(pictures: Path, count: int, folder: Path) -> Artifact:
    rows = [
        ImageRecord(
            "made",
            name_of(at),
            str(pictures),
            f"{at:064x}",
            SIDE,
            SIDE,
            label=str(at % LABELS),
            component="all",
        )
        for at in range(count)
    ]
    folder.mkdir()
    ImageIndex(rows).save(folder)
    return _artifact("curate", folder)


def _artifact(kind: str, folder: Path) -> Artifact:
    manifest = Manifest(kind=kind, key="1" * 64, created="", files={}, provenance={}, summary={})
    return Artifact("1" * 64, kind, folder, manifest)


def _backbone(folder: Path) -> Artifact:
    model(folder / "model")
    (folder / "history.json").write_text(json.dumps([{"step": 1, "metrics": {"loss": 1.0}}]))
    return _artifact("pretrain", folder)


def main(pictures: Path, count: int, out: Path, workers: int) -> None:
    """Run the stage; its figures become `out`/figures.json. Without workers this process does all of it."""
    (out / "out").mkdir(parents=True)
    (out / "work").mkdir()
    context = Context(
        name="evaluate",
        pipeline="bench",
        seed=0,
        key="0" * 64,
        inputs={"index": _index(pictures, count, out / "index"), "pretrain": _backbone(out / "backbone")},
        keys={},
        sources={},
        out=out / "out",
        work=out / "work",
        elastic=Elastic(workers=(1, 2), device="cpu"),
        run=NullRun(),
    )
    stage = Evaluate.model_validate({**_STAGE, "models_at_once": workers or None})
    if workers:
        init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=_OBJECT_STORE,
        )
    try:
        figures = stage.run(context)
    finally:
        shutdown()
    (out / "figures.json").write_text(json.dumps(dict(figures)))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
