"""What the report says of its own table."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.stages.evaluate.results import Results, Score
from orchestrator.stages.evaluate.verdict import verdict

BASELINES = [
    Score("majority group", "baseline", 0.2),
    Score("raw pixels", "baseline", 0.43),
    Score("random vit_nano", "random weights", 0.41, model="vit_nano", image_size=64),
]
ALONE = Score("pretrain, step 300", "own backbone", 0.45, model="vit_nano", image_size=64)


def student(name: str, accuracy: float) -> Score:
    return Score(f"student {name}", "student", accuracy, model="vit_nano", image_size=64, student=name)


def results(*scores: Score, num_from_scratch: int = 0) -> Results:
    """Of 1,000 photos: two standard errors of a difference are about 0.044."""
    return Results(
        "t", 5, 1000, {"x": 600, "y": 400}, [*BASELINES, *scores], {}, {}, {}, {}, {},
        num_from_scratch=num_from_scratch,
    )  # fmt: skip


def test_each_student_and_the_model_that_was_trained_alone_have_a_sentence() -> None:
    found = verdict(results(ALONE, student("vit", 0.62), student("cnn", 0.48), num_from_scratch=1234))
    assert found.split(". ") == [
        "The student vit (0.620) beats raw pixels (0.430), random weights (0.410) and training from scratch (0.450)",
        "The student cnn (0.480) beats raw pixels (0.430) and random weights (0.410), but not training from scratch "
        "(0.450)",
        "Training from scratch on 1,234 photos (0.450) does not beat raw pixels (0.430) or random weights (0.410)",
        "One beats another if it is ahead by more than two standard errors of the difference; less may be luck.",
    ]


def test_a_lead_within_the_error_is_no_lead() -> None:
    assert "(0.473) beats random weights (0.410), but not raw pixels (0.430)." in verdict(
        results(student("vit", 0.473))
    )
    assert "(0.475) beats raw pixels" in verdict(results(student("vit", 0.475)))


def test_a_backbone_is_a_teacher_where_its_students_are_of_it() -> None:
    teacher = replace(ALONE, family="backbone", accuracy=0.5)
    found = verdict(results(teacher, student("vit", 0.6)))
    assert "The student vit (0.600) beats raw pixels (0.430) and random weights (0.410)." in found
    assert "The teacher (0.500) beats raw pixels (0.430) and random weights (0.410)." in found
    started = verdict(results(ALONE, student("vit", 0.6)))
    assert "scratch" not in started
    assert "Training without a teacher (0.450) does not beat raw pixels" in started
    assert "and the backbone (0.450)." in started


def test_without_labels_or_models_nothing_is_said() -> None:
    assert verdict(Results("t", 5, 9, {}, [], {}, {}, {}, {}, {})) == ""
    assert verdict(results()) == ""
