"""The evaluation of ten models takes less time the more workers score them at once, with equal figures.

The arms are wall seconds of the same evaluation on a Ray cluster of this machine at 1, 2 and 4 workers, each of one
processor: k-NN of ten random towers on noisy pictures of ten colours. Features are not kept, and workers are warm.
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.harness import Claim, UnfairError, interleave, timed
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.rng import generator
from orchestrator.models import build, save_pretrained
from orchestrator.stages.evaluate.candidates import Candidate
from orchestrator.stages.evaluate.measure import pool_of
from orchestrator.stages.evaluate.scoring import Work, score_all
from orchestrator.stages.evaluate.shown import largest_groups
from orchestrator.stages.evaluate.towers import load_tower

_MODELS, _LABELS, _SIDE = 10, 10, 64
_WORKERS = (1, 2, 4)
# Of the workers' number: decoding and the driver's own part take the rest.
_SHARE = 0.8


def run(quick: bool) -> Claim:
    """Ten thousand pictures and three rounds; 400 pictures and one round in the quick run."""
    import ray

    found: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        index = _pictures(root, 400 if quick else 10_000)
        models = [_model(root / f"model-{number}", number) for number in range(_MODELS)]
        groups = largest_groups(index.labels, _LABELS)
        work = Work(
            name="bench", pool=pool_of(index, None, groups, everything=False), shown=(), metrics=(), k=5, batch=64,
            seed=0, kept_features=0, num_models=_MODELS,
        )  # fmt: skip

        def score(workers: int) -> None:
            scored = score_all(work, models, root, lambda: None, workers)
            found[workers] = [row.accuracy for row in scored.scores]

        ray.init(num_cpus=max(_WORKERS), include_dashboard=False, log_to_driver=False)
        try:
            score(max(_WORKERS))
            arms = interleave(
                {f"{workers} workers": timed(partial(score, workers)) for workers in _WORKERS},
                1 if quick else 3,
            )
        finally:
            ray.shutdown()
    if not found[1] == found[2] == found[4]:
        raise UnfairError("the figures depend on the number of workers")
    most = max(workers for workers in _WORKERS if workers <= len(os.sched_getaffinity(0)))
    return Claim(
        claim=f"evaluations of {_MODELS} models a second at {most} workers, over those at 1, with equal figures",
        figure=arms["1 workers"].median / arms[f"{most} workers"].median,
        unit="of 1",
        goal=_SHARE * most,
        limit=float(most),
        arms=arms,
        notes=(
            f"arms are seconds; {len(index):,} pictures at {_SIDE} px, towers vit_nano, one processor a worker",
        ),
        better="more",
    )


def _pictures(root: Path, count: int) -> ImageIndex:
    rng, rows = generator(0, "bench evaluate_scale"), []
    for number in range(count):
        label = number % _LABELS
        pixels = rng.integers(0, 200, (_SIDE, _SIDE, 3), dtype=np.uint8)
        pixels[..., label % 3] += np.uint8(5 * label)
        Image.fromarray(pixels).save(root / f"{number}.png", compress_level=1)
        rows.append(
            ImageRecord("noise", f"{number}.png", str(root), f"{number:064x}", _SIDE, _SIDE, label=str(label))
        )
    return ImageIndex(rows)


def _model(folder: Path, seed: int) -> Candidate:
    torch.manual_seed(seed)
    save_pretrained(folder, build("vit_nano").state_dict(), "vit_nano", {"image_size": _SIDE})
    return Candidate(f"model {seed}", "backbone", partial(load_tower, folder, None, "bench"))
