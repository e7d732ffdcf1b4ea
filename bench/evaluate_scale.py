"""The evaluation of ten models takes less time the more workers score them at once, with equal figures.

The arms are wall seconds of the same evaluation on a Ray cluster of this machine at 1, 2 and 4 workers, each of one
processor: k-NN of ten random towers and of raw pixels on noisy pictures of ten colours. Features are not kept, and
workers are warm. More workers than processors show what it costs to ask for too many.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
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

_MODELS, _LABELS, _SIDE, _PRESET = 10, 10, 32, "vit_pico"
_WORKERS = (1, 2, 4)
# Of the workers' number: decoding and the driver's own part take the rest.
_SHARE = 0.8


def run(quick: bool, pictures: int = 10_000, rounds: int = 2) -> Claim:
    """Ten thousand small pictures and two rounds; 400 pictures and one round in the quick run."""
    import ray

    found: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        index = _pictures(root, 400 if quick else pictures)
        models = [_model(root / f"model-{number}", number) for number in range(_MODELS)]
        groups = largest_groups(index.labels, _LABELS)
        pool = pool_of(index, None, groups, everything=False)
        work = Work(
            name="bench", pool=pool, shown=(), metrics=(), k=5, batch=64, seed=0, kept_features=0,
            num_models=_MODELS,
        )  # fmt: skip
        few = replace(work, pool=replace(pool, rows=pool.rows[: 10 * _LABELS]))

        def score(workers: int, work: Work = work) -> None:
            scored = score_all(work, models, root, lambda: None, workers)
            found[workers] = [row.accuracy for row in scored.scores]

        ray.init(address="local", num_cpus=max(_WORKERS), include_dashboard=False, log_to_driver=False)
        try:
            score(max(_WORKERS), few)
            arms = interleave(
                {f"{workers} workers": timed(partial(score, workers)) for workers in _WORKERS},
                1 if quick else rounds,
            )
        finally:
            ray.shutdown()
    if not found[1] == found[2] == found[4]:
        raise UnfairError("the figures depend on the number of workers")
    cores = len(os.sched_getaffinity(0))
    most = max(workers for workers in _WORKERS if workers <= cores)
    seconds = {workers: arms[f"{workers} workers"].median for workers in _WORKERS}
    return Claim(
        claim=f"evaluations of {_MODELS} models a second at {most} workers, over those at 1, with equal figures",
        figure=seconds[1] / seconds[most],
        unit="of 1",
        goal=_SHARE * most,
        limit=float(most),
        arms=arms,
        notes=(
            f"arms are seconds; {len(index):,} pictures at {_SIDE} px, towers {_PRESET}, {cores} processors",
            ", ".join(f"{seconds[1] / seconds[workers]:.2f} at {workers} workers" for workers in _WORKERS),
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
    save_pretrained(folder, build(_PRESET).state_dict(), _PRESET, {"image_size": _SIDE})
    return Candidate(f"model {seed}", "backbone", partial(load_tower, folder, None, "bench"))
