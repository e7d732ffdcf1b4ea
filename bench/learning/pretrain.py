"""Pretraining from nothing beats random weights and raw pixels, by k-NN on pictures that were never trained on."""

from __future__ import annotations

from typing import Any

from bench.learning import measure
from bench.learning.finding import Finding, Question, beats
from bench.learning.ground import MODEL, POOL, SIZE, Ground, final, snapshots
from bench.learning.lab import Trained

SETS = (*POOL, "fashion")


def run(ground: Ground) -> Finding:
    """One tower for the three coloured sets, one for Fashion-MNIST."""
    lab = ground.lab
    jobs = [(name, seed) for name in ("pool", "fashion") for seed in lab.seeds]
    trained = dict(
        zip(
            jobs,
            lab.each(lambda name, seed: _train(ground, name, seed), *zip(*jobs, strict=True)),
            strict=True,
        )
    )
    arms: dict[str, list[float]] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    for name in SETS:
        bank, queries = ground.knn_pictures(name)
        arms[f"{name}: majority"] = [measure.majority(queries)] * len(lab.seeds)
        arms[f"{name}: raw pixels"] = [measure.knn_raw(bank, queries)] * len(lab.seeds)
        of_seed = [trained["fashion" if name == "fashion" else "pool", seed] for seed in lab.seeds]
        arms[f"{name}: random weights"] = [
            measure.knn(bank, queries, measure.random_net(MODEL, seed)) for seed in lab.seeds
        ]
        arms[f"{name}: pretrained"] = [measure.knn(bank, queries, final(one)) for one in of_seed]
        curves[name] = {
            str(step): [
                measure.knn(bank, queries, measure.snapshot(snapshots(one)[step], MODEL)) for one in of_seed
            ]
            for step in snapshots(of_seed[0])
        }
    return Finding("pretrain", arms, _questions(arms), curves, _settings(ground))


def _train(ground: Ground, name: str, seed: int) -> Trained:
    if name == "pool":
        return ground.base(seed)
    index = ground.lab.index(ground.parts("fashion")[0])
    return ground.lab.train("fashion", ground.base_stage, seed, {"index": index})


def _questions(arms: dict[str, list[float]]) -> list[Question]:
    return [
        beats(f"{name}: pretrained beats {other}", arms[f"{name}: pretrained"], arms[f"{name}: {other}"])
        for name in SETS
        for other in ("random weights", "raw pixels")
    ]


def _settings(ground: Ground) -> dict[str, Any]:
    return {"stage": ground.base_stage.identity(), "size": SIZE, "neighbours": measure.NEIGHBOURS}
