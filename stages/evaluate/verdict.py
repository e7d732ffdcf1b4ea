"""The sentences that a reader of the k-NN table needs: which models are above raw pixels, and which are not."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.stages.evaluate.results import Results, Score

# Standard errors of a difference, above which it is taken for more than luck.
_ERRORS = 2.0
_RULE = (
    "One beats another if it is ahead by more than two standard errors of the difference; less may be luck."
)


def verdict(results: Results) -> str:
    """What each student beats, and the backbone that was trained here: a sentence each.

    A model beats another if it is ahead by more than two standard errors of the difference. Both were asked about the
    same photos, so that the true error of the difference is smaller.

    Returns:
        "" without the accuracy of raw pixels, or without a model of the pipeline's own.
    """
    raw = results.named("baseline", 1)
    if raw is None:
        return ""
    own = results.last("own backbone")
    sentences = []
    for student in results.students.values():
        rivals = {
            "raw pixels": raw,
            "random weights": results.untrained(student),
            "training from scratch" if results.num_from_scratch else "the backbone": own,
        }
        sentences.append(_sentence(f"The student {student.student}", student, rivals, results.num_photos))
    if backbone := own or results.teacher:
        rivals = {"raw pixels": raw, "random weights": results.untrained(backbone)}
        who = "The teacher" if own is None else "Training without a teacher"
        if own and results.num_from_scratch:
            who = f"Training from scratch on {results.num_from_scratch:,} photos"
        sentences.append(_sentence(who, backbone, rivals, results.num_photos))
    return " ".join([*sentences, _RULE] if sentences else [])


def _sentence(who: str, score: Score, rivals: dict[str, Score | None], num_photos: int) -> str:
    """`The student vit (0.612) beats raw pixels (0.437), but not random weights (0.590).`"""
    known = {name: rival for name, rival in rivals.items() if rival is not None}
    beaten = [name for name, rival in known.items() if _beats(score, rival, num_photos)]
    shown = {name: f"{name} ({rival.accuracy:.3f})" for name, rival in known.items()}
    first = _list([shown[name] for name in beaten], "and")
    rest = _list([shown[name] for name in known if name not in beaten], "or")
    says = f"beats {first}" if beaten else f"does not beat {rest}"
    return f"{who} ({score.accuracy:.3f}) {says}{f', but not {rest}' if beaten and rest else ''}."


def _beats(ours: Score, theirs: Score, num_photos: int) -> bool:
    error = math.sqrt(sum(one.accuracy * (1 - one.accuracy) / num_photos for one in (ours, theirs)))
    return ours.accuracy - theirs.accuracy > _ERRORS * error


def _list(names: Sequence[str], word: str) -> str:
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
