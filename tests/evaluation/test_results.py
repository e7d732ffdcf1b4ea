"""What the report compares with what."""

from __future__ import annotations

from orchestrator.stages.evaluate.report import _tiles
from orchestrator.stages.evaluate.results import Results, Score


def test_the_best_student_stands_beside_random_weights_of_its_own_model_and_size() -> None:
    scores = [
        Score("majority", "baseline", 0.2),
        Score("raw", "baseline", 0.43),
        Score("random", "random weights", 0.40, model="vit_nano", image_size=96),
        Score("random", "random weights", 0.41, model="vit_nano", image_size=64),
        Score("random", "random weights", 0.43, model="convnext_mini", image_size=64),
        Score("teacher", "backbone", 0.44, model="vit_nano", image_size=96),
        Score("a", "student", 0.41, model="vit_nano", image_size=64, student="a"),
        Score("b", "student", 0.42, model="convnext_mini", image_size=64, student="b"),
    ]
    results = Results("t", 5, 9, {"x": 9}, scores, {}, {}, {}, {}, {})
    tiles = {tile.label.removeprefix("5-NN, "): tile.value for tile in _tiles(results)}
    assert tiles == {
        "teacher": "0.440",
        "best student": "0.420",
        "raw pixels": "0.430",
        "random weights": "0.430",
    }
    teacher_only = Results("t", 5, 9, {"x": 9}, scores[:6], {}, {}, {}, {}, {})
    assert {tile.label: tile.value for tile in _tiles(teacher_only)}["5-NN, random weights"] == "0.400"
