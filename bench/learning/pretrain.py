"""Pretraining from nothing beats random weights and raw pixels, by k-NN on pictures that were never trained on."""

from __future__ import annotations

from typing import Any

from bench.learning import measure
from bench.learning.finding import Finding, Question, beats
from bench.learning.ground import MODEL, POOL, SIZE, Ground, final, snapshots


def run(ground: Ground) -> Finding:
    """One tower for all sets."""
    lab = ground.lab
    trained = lab.each_seed(ground.base)
    arms: dict[str, list[float]] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    for name in POOL:
        bank, queries = ground.knn_pictures(name)
        arms[f"{name}: majority"] = [measure.majority(queries)] * len(lab.seeds)
        arms[f"{name}: raw pixels"] = [measure.knn_raw(bank, queries)] * len(lab.seeds)
        arms[f"{name}: random weights"] = [
            measure.knn(bank, queries, measure.random_net(MODEL, seed)) for seed in lab.seeds
        ]
        arms[f"{name}: pretrained"] = [measure.knn(bank, queries, final(one)) for one in trained]
        curves[name] = {
            str(step): [
                measure.knn(bank, queries, measure.snapshot(snapshots(one)[step], MODEL)) for one in trained
            ]
            for step in snapshots(trained[0])
        }
    arms["within a picture: random weights"] = [
        ground.within_score(measure.random_net(MODEL, seed)) for seed in lab.seeds
    ]
    arms["within a picture: pretrained"] = [ground.within_score(final(one)) for one in trained]
    return Finding("pretrain", arms, _questions(arms), curves, _settings(ground))


def _questions(arms: dict[str, list[float]]) -> list[Question]:
    return [
        beats(f"{name}: pretrained beats {other}", arms[f"{name}: pretrained"], arms[f"{name}: {other}"])
        for name in POOL
        for other in ("random weights", "raw pixels")
    ] + [
        beats(
            "within a picture: pretrained beats random weights",
            arms["within a picture: pretrained"],
            arms["within a picture: random weights"],
        )
    ]


def _settings(ground: Ground) -> dict[str, Any]:
    return {"stage": ground.base_stage.identity(), "size": SIZE, "neighbours": measure.NEIGHBOURS}
