"""High-resolution refinement: k-NN and patch score over the input size, before it, after it, and after the same steps
at the old size.
"""

from __future__ import annotations

from typing import Any

from bench.learning import measure
from bench.learning.finding import Finding, Question, beats
from bench.learning.ground import CROPS, SIZE, Ground, final
from bench.learning.lab import Trained
from orchestrator.models import Backbone
from orchestrator.stages.ssl.high_res import HighRes

SIZES = (32, 64, 96, 128)
# Global, local and Gram-teacher size, and how often: the paper's triples at a sixth of their size.
TRIPLES = ((96, 32, 128, 0.4), (128, 32, 192, 0.4), (128, 48, 192, 0.2))
_STAYS = ((SIZE, SIZE // 2, 2 * SIZE, 1.0),)
_SETS = ("food", "stamps")


def run(ground: Ground) -> Finding:
    """Scores at all sizes for every seed."""
    lab = ground.lab
    bases = lab.each_seed(ground.base)
    jobs = [
        (way, seed, base)
        for way in ("after", "same size")
        for seed, base in zip(lab.seeds, bases, strict=True)
    ]
    ends = lab.each(lambda *job: _train(ground, *job), *zip(*jobs, strict=True))
    runs = {"before": bases}
    for (way, *_), end in zip(jobs, ends, strict=True):
        runs.setdefault(way, []).append(end)
    curves: dict[str, dict[str, list[float]]] = {}
    for way, of_way in runs.items():
        nets = [final(one) for one in of_way]
        curves[f"patch score: {way}"] = {
            str(size): [ground.patch_score(net, size) for net in nets] for size in SIZES
        }
        curves[f"within a picture: {way}"] = {
            str(size): [ground.within_score(net, size) for net in nets] for size in SIZES
        }
        for name in _SETS:
            curves[f"{name}: {way}"] = _knn_curve(ground, name, nets)
    arms = {
        f"{curve} at {size} px": curves[curve][str(size)] for curve in curves for size in (SIZE, 2 * SIZE)
    }
    return Finding("highres", arms, _questions(arms), curves, _settings(ground))


def high_res_stage(ground: Ground, way: str) -> HighRes:
    """The refinement, or the same with all its steps at the old size."""
    triples = TRIPLES if way == "after" else _STAYS
    names = ("global_size", "local_size", "gram_size", "p")
    fields = ground.settings(
        32,
        4,
        kind="high_res",
        optimizer={"lr": {"peak": 5e-4, "warmup_steps": 4 if ground.lab.quick else 10}},
        resolutions=[dict(zip(names, triple, strict=True)) for triple in triples],
        gram={"weight": {"peak": 1.5}, "teacher": "latest"},
        local_weight={"peak": 0.5},
    )
    return HighRes.model_validate({**fields, "crops": {**CROPS, "gram_size": 2 * SIZE}})


def _train(ground: Ground, way: str, seed: int, base: Trained) -> Trained:
    stage = high_res_stage(ground, way)
    return ground.lab.train(
        f"highres-{way.split()[0]}", stage, seed, {"index": ground.index, "backbone": base}
    )


def _knn_curve(ground: Ground, name: str, nets: list[Backbone]) -> dict[str, list[float]]:
    points = {}
    for size in SIZES:
        bank, queries = ground.knn_pictures(name, size)
        points[str(size)] = [measure.knn(bank, queries, net) for net in nets]
    return points


def _questions(arms: dict[str, list[float]]) -> list[Question]:
    asked = []
    for name in (*_SETS, "patch score", "within a picture"):
        before, after = (f"{name}: {way} at {2 * SIZE} px" for way in ("before", "after"))
        asked.append(beats(f"{name}: better at {2 * SIZE} px after than before", arms[after], arms[before]))
    return asked


def _settings(ground: Ground) -> dict[str, Any]:
    return {way: high_res_stage(ground, way).identity() for way in ("after", "same size")}
